"""The documentation tells the truth: commands, Python example, flags, refusals, files, links."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import inversion.audit.flags
import inversion.audit.settings
import run
import train.flags
import train.settings
import training
from docs.flags import page as flag_page
from inversion.audit.flags import tuned_flag
from inversion.settings import RANGES
from models.binding import bind
from models.build import build_model
from models.checkpoint import FORMAT, load
from tests.damaged_files import png_of
from tests.support import ROOT, Hostile, Outcome, attack, call, capture_photos
from tests.test_datasets import celeba_folder, image_folder
from tests.test_models import moco_file
from utils.flags import process_settings
from utils.launch import free_address, group_from
from utils.tensor_files import save

#: Every page; the README is first, since other pages attack the checkpoint of its first command.
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
        ROOT / "Demo_images" / "README.md",
    )
}
#: Flags that the pages name and that belong to other programs.
FOREIGN_FLAGS = {"--help", "--nproc-per-node", "--few-classes", "--trials", "--csv", "--markdown"}
FOREIGN_FLAGS |= {"--size", "--picture", "--pairs"}  # of benchmarks.updates, benchmarks.saving
FOREIGN_FLAGS |= {"--only-time", "--only-cost"}  # of benchmarks.first_order, benchmarks.bn_coupling
FOREIGN_FLAGS |= {"--section", "--out"}  # of benchmarks.gpu
FOREIGN_FLAGS |= {"--seeds", "--rows", "--rounds", "--only", "--weights", "--curve"}
FOREIGN_FLAGS |= {"--settings", "--methods", "--eval-mode", "--boxed"}  # of benchmarks.peers
FOREIGN_FLAGS |= {"--before", "--sensitivity"}  # of benchmarks.layerwise_time


def section(page, title):
    """The text below a heading of the second level, up to the next one."""
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(text):
    """The names in backquotes of the first column of the tables in `text`, in order."""
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(.*?)`", cell)]


def commands():
    """(command, lines it should print) of every sh block of every page, in order."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# prints: "):
                found[-1][1].append(line.removeprefix("# prints: "))
            else:
                found.append((line, []))
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the commands of the pages name, shared by all of them."""
    folder = tmp_path_factory.mktemp("readme")
    image_folder(folder / "imagenet" / "train", classes=("n01", "n02"), count=8, size=(250, 240))
    image_folder(folder / "pictures")
    celeba_folder(folder / "celeba", count=8)
    torch.manual_seed(0)
    moco_file(torchvision.models.resnet50(), folder / "moco_v2_800ep_pretrain.pth.tar")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    os.rename(capture_photos(folder, "-a", "convnet", "-b", "4"), folder / "convnet.tar")
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    own = ("-a", "convnet", "-b", "4", "--target-idx", "1")
    os.rename(capture_photos(folder, *own), folder / "simulation.tar")
    return folder


SMALL_SEARCH = " --num-samples 1 --HP-epochs 4 --min-t 2 --max-t 4 --verbose 0"
#: Captures of ResNet-50, which is slow at its 224 pixels: those are for test_datasets.
SMALL_IMAGES = {
    command
    for command, _ in commands()
    if "training.py" in command and "--data imagenet" in command and not command.endswith("--ra")
}


@pytest.mark.parametrize(("command", "prints"), commands())
def test_commands_run_and_print_what_is_said(command, prints, workplace, monkeypatch):
    """As written, but with two iterations and small images, and on the first device there is."""
    monkeypatch.chdir(workplace)
    if command in SMALL_IMAGES:
        command += " --image-size 32"
    if "--dry-run" not in command:
        command = re.sub(r"--epochs \d+", "--epochs 2", command)
        if "--superparameters-search" in command:
            command += SMALL_SEARCH
            simulation = f"--simulation-checkpoint {workplace}/simulation.tar"
            command = re.sub(r"--simulation-checkpoint \S+", simulation, command)
        if "--MinCombine" in command or "--superp" in command:  # many attacks: a small network
            command = re.sub(
                r" --checkpoint \S+", f" --checkpoint {workplace}/convnet.tar", command
            )
    command = command.replace("--gpu 0 ", "")
    if "--multiprocessing-distributed" in command or command.startswith("torchrun"):
        outcome = in_several_processes(command, workplace)
    else:
        python, script, *flags = shlex.split(command)
        assert python == "python"
        outcome = call(script, *flags)
    assert outcome.code == 0, outcome.err
    assert prints, "the page says nothing of what this command prints"
    for text in prints:
        assert text in outcome.out


def in_several_processes(command, workplace):
    """As docs/original.md has it for a machine without CUDA; with a small batch and a free port."""
    program, *words = shlex.split(command.replace(" -b 256", " -b 3").replace("_b256_", "_b3_"))
    if not torch.cuda.is_available():
        words = (
            " ".join(words).replace("--dist-backend nccl", "--dist-backend gloo --nproc 2").split()
        )
    words = [free_address() if word.startswith("tcp://") else word for word in words]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    words[script] = str(ROOT / words[script])
    if program == "torchrun":
        port = free_address().rpartition(":")[2]
        words = ["-m", "torch.distributed.run", "--master-port", port, *words]
    before = result_files(workplace)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if words[script].endswith("run.py"):
        assert done.stdout.count("plan: ") == 1, done.stderr
        assert result_files(workplace) - before
    return Outcome(done.returncode, done.stdout.replace("_b3_", "_b256_"), done.stderr)


def result_files(folder):
    return set((folder / "results").rglob("result.json"))


def test_the_simulation_shares_no_image_with_the_target():
    """Batches of one permutation and of different numbers are disjoint."""
    target, simulation = (
        training.parser().parse_args(shlex.split(command)[2:])
        for command, _ in commands()
        if command.startswith(("python training.py -b 8 ", "python training.py --id simulation "))
        and "--ra" not in command
    )
    assert (target.seed, target.data) == (simulation.seed, simulation.data)
    assert target.target_idx != simulation.target_idx


def test_there_are_commands():
    assert len(commands()) >= 25
    assert len(SMALL_IMAGES) == 4
    assert sum("--MinCombine --checkpoint" in command for command, _ in commands()) == 1


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    torch.manual_seed(0)
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    x, found = space["x"], space["audit"].images
    flat = (x.mean((-2, -1), keepdim=True) - x).square().mean().item()
    assert (found - x).square().mean().item() < 0.5 * flat


def test_the_flag_page_is_what_the_parsers_say():
    """Otherwise run `make docs`."""
    assert PAGES["docs/flags.md"] == flag_page()


def flag_rows(title):
    text = section("docs/flags.md", title)
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \| (.+?) \|$", text, re.MULTILINE)
    return {tuple(re.findall(r"`(.*?)`", names)): default for names, default, _ in rows}


@pytest.mark.parametrize("script", [training, run])
def test_every_flag_is_described_with_its_default(script):
    """The rows of the page, read without the generator's help."""
    rows = flag_rows(f"Flags of {script.__name__}.py")
    actions = [a for a in script.parser()._actions if "--help" not in a.option_strings]
    assert rows.keys() == {tuple(action.option_strings) for action in actions}
    for action in actions:
        default = str(action.default)
        if action.default is None or action.default is False:
            default = "none" if action.default is None else "off"
        assert rows[tuple(action.option_strings)] == default, action.option_strings


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/refusals.md"])
def test_every_flag_that_a_page_names_exists(page):
    known = {name for script in (training, run) for name in script.parser()._option_string_actions}
    for code in re.findall(r"```.*?```|`[^`\n]*`", PAGES[page], re.DOTALL):
        named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code))
        assert named <= known | FOREIGN_FLAGS, code


def test_the_ranges_of_the_search_are_those_of_the_page():
    rows = re.findall(r"^\| `(--.*?)-tune` \| .*? \| (.*?) to (.*?), (.*?) \|$",
                      PAGES["docs/search.md"], re.MULTILINE)  # fmt: skip
    kinds = {"integers": "integer", "evenly": "uniform", "on a log scale": "loguniform"}
    stated = {flag: (kinds[kind], float(low), float(high)) for flag, low, high, kind in rows}
    assert stated == {tuned_flag(name): (of.kind, of.low, of.high) for name, of in RANGES.items()}


def test_every_entry_of_a_checkpoint_is_described(tmp_path):
    """And none that is not there."""
    options = ("-a", "resnet18", "--image-size", "32", "-b", "2", "--upload-bn", "--with-control",
               "--decoys", "1", "--enable-dp", "-C", "1")  # fmt: skip
    checkpoint = load(str(capture_photos(tmp_path, *options)))
    rows = section("docs/files.md", "The checkpoint").split("| --- |")[1]
    assert sorted(first_column(rows)) == sorted([*checkpoint, "checksums"])  # `load` takes it off


def test_every_entry_of_a_result_is_described(tmp_path):
    """And none that is not there."""
    checkpoint = capture_photos(tmp_path, "-a", "lenet", "-b", "2", "--with-control")
    result, folder = attack(tmp_path, checkpoint, "--metric")
    whole, metrics = section("docs/files.md", "result.json").split("The entries of `metrics`:")
    assert sorted(first_column(whole)) == sorted(result)
    assert sorted(first_column(metrics)) == sorted(result["metrics"])
    written = {path.name for path in folder.iterdir()}
    assert written <= {
        n.strip("/") for n in first_column(section("docs/files.md", "Files of run.py"))
    }


#: Command lines that between them make the settings read every flag.
IMPORT = "--import-update a b --local-lr 1 --local-steps 2 --num-classes 3"
CLIENT = ("--data-name photos --enable-dp --sigma 1 -C 1 --with-control", "--ra", IMPORT)
SEARCH = "--superparameters-search --TV-tune --simulation-checkpoint g --min-t 2 --max-t 4"
ATTACKER = (
    "--checkpoint f --epochs 9 --lr 0.1 --metric --MinCombine",
    f"--checkpoint f --epochs 9 --lr 0.1 {SEARCH} --HP-epochs 4",
)


#: Flags that the parser and `run_script` see to.
OF_EVERY_SCRIPT = {"help", "version", "traceback"}
#: Of run.py: what chooses whose settings the other flags are read by.
#: And how the run is saved, which is no setting of what it computes.
OF_MAIN = {"audit", "save_every", "resume"}


class Recording(argparse.Namespace):
    """Flags that remember which of them were read."""

    def __getattribute__(self, name):
        if name != "__dict__":
            vars(self).setdefault("_read", set()).add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("parser", "settings_from", "lines"),
    [
        (train.flags.parser(), train.settings.settings_from, CLIENT),
        (inversion.audit.flags.parser(), inversion.audit.settings.settings_from, ATTACKER),
    ],
)
def test_every_flag_is_read(parser, settings_from, lines, tmp_path, monkeypatch):
    """Each reaches a setting."""
    monkeypatch.chdir(tmp_path)
    read = set()
    for line in lines:
        args = Recording(**vars(parser.parse_args(shlex.split(line))))
        settings_from(args)
        group_from(process_settings(args))
        read |= vars(args)["_read"]
    assert {action.dest for action in parser._actions} - OF_EVERY_SCRIPT - OF_MAIN <= read


def error_rows():
    return re.findall(
        r"^\| `((?:training|run)\.py.*?)` \| (.*?) \|$", PAGES["docs/refusals.md"], re.M
    )


def own_networks(folder):
    """Files of a user's, right and wrong, and a list of labels."""
    shutil.copy(ROOT / "docs" / "examples" / "unet.py", folder)
    (folder / "broken.py").write_text("import torch\n1 / 0\n")
    (folder / "segment.py").write_text(SEGMENT)
    (folder / "labels.csv").write_text("file,nodule\nno.png,1\n")


#: Networks that make no logits, and one that has no head.
SEGMENT = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, shape, then):
        super().__init__()
        self.map, self.then = nn.Conv2d(shape[0], num_classes, 1), then
    def forward(self, x):
        return self.then(self.map(x))

def build(num_classes, shape):
    return Net(num_classes, shape, lambda x: x)

def both(num_classes, shape):
    return Net(num_classes, shape, lambda x: {"out": x, "aux": x})

def cold(num_classes, shape):
    return Net(num_classes, shape, lambda x: x.mean((2, 3)))
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder with the files that the tables of refusals name."""
    folder = tmp_path_factory.mktemp("errors")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "2"), folder / "lenet.tar")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "3", *OTHER), folder / "other.tar")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "2", "--seal"), folder / "sealed.tar")
    own_networks(folder)
    own = ("-b", "2", "--model", f"{folder}/unet.py:build", "--outlayer-state", "keep")
    os.rename(capture_photos(folder, *own), folder / "own.tar")
    binary = ("-a", "lenet", "-b", "2", "--loss", "bce", "--distinct-labels", "2")
    os.rename(capture_photos(folder, *binary), folder / "bce.tar")
    foreign = ("-a", "lenet", "-b", "2", "--seal", *OTHER)
    capture_photos(folder / "client", *foreign)
    os.rename(next((folder / "client").glob("*-truth.pth.tar")), folder / "foreign.tar")
    squeezenet = ("-a", "squeezenet1_1", "-b", "2", "--image-size", "64")
    os.rename(capture_photos(folder, *squeezenet), folder / "squeezenet.tar")
    checkpoint = load(str(folder / "lenet.tar"))
    setup = checkpoint["dataset_setup"] | {"n_classes": 10}
    save(checkpoint | {"dataset_setup": setup}, str(folder / "ten.tar"))
    save(checkpoint | {"format": FORMAT + 1}, str(folder / "newer.tar"))
    gradient = checkpoint["target_gradient"]
    unfit = [torch.ones(2, 2), *gradient[1:]]
    save(checkpoint | {"target_gradient": unfit}, str(folder / "unfit.tar"))
    expanded = [torch.ones(1).expand_as(gradient[0]), *gradient[1:]]
    save(checkpoint | {"target_gradient": expanded}, str(folder / "expanded.tar"))
    state = checkpoint["state_dict"]
    integers = state | {"0.weight": state["0.weight"].long()}
    save(checkpoint | {"state_dict": integers}, str(folder / "integers.tar"))
    save(checkpoint | {"y_true": checkpoint["y_true"].float()}, str(folder / "floats.tar"))
    flipped = bytearray((folder / "lenet.tar").read_bytes())
    flipped[flipped.index(state["0.weight"].numpy().tobytes())] ^= 1
    (folder / "flipped.tar").write_bytes(flipped)
    written = torch.load(folder / "lenet.tar", weights_only=True)
    written["state_dict"]["0.weight"][0] += 1
    save(written, str(folder / "altered.tar"))
    sealed = load(str(folder / "sealed.tar"))
    for name, change in (
        ("huge", {"size": (3, 100_000, 100_000)}),
        ("many", {"n_classes": 2**31 - 1}),
    ):
        setup = sealed["dataset_setup"] | change
        save(sealed | {"dataset_setup": setup}, str(folder / f"{name}.tar"))
    save(checkpoint | {"note": torch.ones(2).to_sparse()}, str(folder / "sparse.tar"))
    record = checkpoint["args"] | {"label_smoothing": torch.ones(2)}
    save(checkpoint | {"args": record}, str(folder / "record.tar"))
    (folder / "long.txt").write_text("1," * 10_000)
    (folder / "outside.csv").write_text("file,one,two\n../file.txt,1,0\n")
    np.savez_compressed(folder / "bomb.npz", zeros=np.zeros(2**26))
    torch.save(checkpoint | {"args": Hostile(folder / "ran")}, folder / "hostile.tar")
    gradient = [65536 * g for g in checkpoint["target_gradient"]]
    save(checkpoint | {"target_gradient": gradient}, str(folder / "scaled.tar"))
    steps = ("-a", "lenet", "-b", "2", "--local-steps", "2", "--local-lr", "0.1")
    os.rename(capture_photos(folder, *steps), folder / "steps.tar")
    convnet = ("-a", "convnet", "-b", "2")
    os.rename(capture_photos(folder, *convnet), folder / "convnet.tar")
    os.rename(capture_photos(folder, *convnet, "--upload-bn"), folder / "uploaded.tar")
    os.rename(capture_photos(folder, *convnet, *OTHER), folder / "simulated.tar")
    in_eval_mode = (*convnet, "--upload-bn", "--model-eval")
    os.rename(capture_photos(folder, *in_eval_mode), folder / "eval.tar")
    uploaded = load(str(folder / "uploaded.tar"))
    names, gradient = uploaded["trainable"], uploaded["target_gradient"]
    kept = [i for i, name in enumerate(names) if name != names[1]]  # that of a BatchNorm's scale
    changes = {k: [uploaded[k][i] for i in kept] for k in ("trainable", "target_gradient")}
    frozen = uploaded | changes
    bind(frozen)
    save(frozen, str(folder / "frozen.tar"))
    (folder / "damaged.tar").write_bytes((folder / "lenet.tar").read_bytes()[:5000])
    torch.save(build_model("convnet", 8, (3, 32, 32)).state_dict(), folder / "convnet.pth")
    image_folder(folder / "pictures")
    image_folder(folder / "single", classes=("all",))
    (folder / "empty").mkdir()
    (folder / "broken" / "a").mkdir(parents=True)
    (folder / "broken" / "a" / "x.png").write_text("no image")
    (folder / "file.txt").write_text("a file")
    (folder / "giant" / "a").mkdir(parents=True)
    (folder / "giant" / "a" / "x.png").write_bytes(png_of(100_000, 100_000))
    odd_folders(folder)
    return folder


def odd_folders(folder):
    """The image folders that the table of refusals names for what is in them."""
    twelve = Image.fromarray(np.full((9, 9), 4000, dtype=np.uint16))
    for name, classes in (("deep", ("a", "b")), ("eight", map(str, range(8)))):
        for inner in classes:
            (folder / name / inner).mkdir(parents=True)
            twelve.save(folder / name / inner / "x.png")
    for name in ("scans", "renamed", "links", "shared"):
        image_folder(folder / name, classes=("b",), count=1)
        (folder / name / "a").mkdir()
    photo = (folder / "scans" / "b" / "000.png").read_bytes()
    (folder / "scans" / "a" / "x.dcm").write_bytes(b"")
    (folder / "renamed" / "a" / "x.old").write_bytes(photo)
    (folder / "links" / "a" / "x.png").symlink_to("nothing")
    (folder / "shared" / "a" / "x.png").write_bytes(photo)
    (folder / "shared" / "b" / "x.png").symlink_to(folder / "shared" / "a" / "x.png")
    image_folder(folder / "same", classes=("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\u0301"))


#: Images that no other file of the table has.
OTHER = ("--target-idx", "1")


def everything_in(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "says"), error_rows())
def test_errors(command, says, mistakes, monkeypatch):
    """Exit code 2, one line, as the page says it, and nothing left behind or changed."""
    monkeypatch.chdir(mistakes)
    before = everything_in(mistakes)
    script, *flags = shlex.split(command)
    outcome = call(script, *flags)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {says}")
    assert outcome.err.count("\n") == 1
    assert "settings\n" not in outcome.out  # the line stands alone, not below forty others
    assert everything_in(mistakes) == before


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = (ROOT / page).parent
    for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[page]):
        goal = here / path if path else ROOT / page
        assert goal.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{path}#{anchor}"


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\((?:docs/)?([\w.-]+\.md)", PAGES["README.md"]))
    assert {page.rpartition("/")[2] for page in PAGES} - {"README.md"} <= links


@pytest.mark.parametrize("page", PAGES)
def test_every_page_begins_with_the_question_that_it_answers(page):
    title, first, *_ = PAGES[page].split("\n\n")
    assert re.fullmatch(r"# .+", title)
    assert "?" in title or "?" in first


def test_the_first_pages_stay_short():
    assert len(PAGES["README.md"].splitlines()) <= 200
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 90


def test_there_are_errors():
    assert len(error_rows()) >= 109


def test_the_tree_names_every_file():
    named, folders = set(), []
    for line in filter(
        str.strip, section("docs/architecture.md", "The tree").split("```")[1].split("\n")
    ):
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    there = {"run.py", "training.py"}
    for folder in ("utils", "models", "train", "inversion"):
        there |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert named == {path for path in there if not path.endswith("__init__.py")}


def test_the_table_of_tests_names_every_test_file():
    named = set(re.findall(r"`(test_\w+)`", PAGES["CONTRIBUTING.md"]))
    assert named == {path.stem for path in (ROOT / "tests").glob("test_*.py")}
