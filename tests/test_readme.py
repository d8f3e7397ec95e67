"""The README tells the truth: its commands, its Python example, its flags and its errors."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torchvision

import run
import training
from inversion.priors import PRIORS
from inversion.search.trial import RANGES
from models.build import build_model
from models.checkpoint import FORMAT, load
from tests.support import ROOT, Hostile, Outcome, call, capture_photos
from tests.test_datasets import celeba_folder, image_folder
from tests.test_models import moco_file
from utils.launch import free_address
from utils.tensor_files import save

LOOKED_UP = {prior.flag for prior in PRIORS.values()}
LOOKED_UP |= {f"{run.tuned_flag(name)}-tune" for name in RANGES}
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands():
    """(command, lines it should print) of every sh block, in order."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# prints: "):
                found[-1][1].append(line.removeprefix("# prints: "))
            else:
                found.append((line, []))
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the README's commands name, shared by all of them."""
    folder = tmp_path_factory.mktemp("readme")
    image_folder(folder / "imagenet" / "train", classes=("n01", "n02"), count=8, size=(250, 240))
    image_folder(folder / "pictures")
    celeba_folder(folder / "celeba", count=8)
    torch.manual_seed(0)
    moco_file(torchvision.models.resnet50(), folder / "moco_v2_800ep_pretrain.pth.tar")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    os.rename(capture_photos(folder, "-a", "convnet", "-b", "4"), folder / "convnet.tar")
    own = ("-a", "convnet", "-b", "4", "--target-idx", "1")
    os.rename(capture_photos(folder, *own), folder / "simulation.tar")
    return folder


SMALL_SEARCH = " --num-samples 2 --HP-epochs 4 --min-t 2 --max-t 4 --max-concurrent 2 --verbose 0"
#: ResNet-50 at 224 pixels is slow here: one iteration.
TINY = {c: 1 for c, _ in commands() if "--n-seed 1 " in c and "--superp" not in c}


@pytest.mark.parametrize(("command", "prints"), commands())
def test_commands_run_and_print_what_is_said(command, prints, workplace, monkeypatch):
    """As written, but with two iterations, and on the first device there is."""
    monkeypatch.chdir(workplace)
    if "--dry-run" not in command:
        command = re.sub(r"--epochs \d+", f"--epochs {TINY.get(command, 2)}", command)
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
    assert prints, "the README says nothing of what this command prints"
    for text in prints:
        assert text in outcome.out


def in_several_processes(command, workplace):
    """As the README says for a machine without CUDA, with a small batch and a free port."""
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
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout.replace("_b3_", "_b256_"), done.stderr)


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
    assert len(commands()) >= 14
    assert len(TINY) == 1
    assert sum("--MinCombine --checkpoint" in command for command, _ in commands()) == 1


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    space = {}
    exec(compile(code, "README.md", "exec"), space)
    error = (space["result"].x - space["x"]).square().mean().item()
    flat = (space["x"].mean((-2, -1), keepdim=True) - space["x"]).square().mean().item()
    assert error < 0.5 * flat


def flag_rows(title):
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \| (.*?) \|$", section(title), re.MULTILINE)
    return {tuple(re.findall(r"`(.*?)`", flags)): default for flags, default, _ in rows}


@pytest.mark.parametrize("script", [training, run])
def test_every_flag_is_described_with_its_default(script):
    rows = flag_rows(f"Flags of {script.__name__}.py")
    actions = [a for a in script.parser()._actions if "--help" not in a.option_strings]
    assert rows.keys() == {tuple(action.option_strings) for action in actions}
    for action in actions:
        default = str(action.default)
        if action.default is None or action.default is False:
            default = "none" if action.default is None else "off"
        assert rows[tuple(action.option_strings)] == default, action.option_strings


@pytest.mark.parametrize("script", [training, run])
def test_every_flag_is_used(script):
    """Each reaches a setting: its value is read somewhere in the script."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    for file in ("utils/launch.py", "inversion/audit/flags.py", "train/settings.py"):
        source += (ROOT / file).read_text()
    for action in script.parser()._actions:
        if action.dest == "help" or action.option_strings[0] in LOOKED_UP:
            continue  # read by the flag in PRIORS or in RANGES
        assert re.search(rf"args\.{action.dest}\b", source), action.dest


def error_rows():
    return re.findall(r"^\| `((?:training|run)\.py.*?)` \| (.*?) \|$", section("Errors"), re.M)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder with the files that the table of errors names."""
    folder = tmp_path_factory.mktemp("errors")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "2"), folder / "lenet.tar")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "3", *OTHER), folder / "other.tar")
    os.rename(capture_photos(folder, "-a", "lenet", "-b", "2", "--seal"), folder / "sealed.tar")
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
    torch.save(checkpoint | {"args": Hostile(folder / "ran")}, folder / "hostile.tar")
    gradient = [65536 * g for g in checkpoint["target_gradient"]]
    save(checkpoint | {"target_gradient": gradient}, str(folder / "scaled.tar"))
    (folder / "damaged.tar").write_bytes((folder / "lenet.tar").read_bytes()[:5000])
    torch.save(build_model("convnet", 8, (3, 32, 32)).state_dict(), folder / "convnet.pth")
    image_folder(folder / "pictures")
    image_folder(folder / "single", classes=("all",))
    (folder / "empty").mkdir()
    (folder / "broken" / "a").mkdir(parents=True)
    (folder / "broken" / "a" / "x.png").write_text("no image")
    (folder / "file.txt").write_text("a file")
    return folder


#: Images that no other file of the table has.
OTHER = ("--target-idx", "1")


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("command", "says"), error_rows())
def test_errors(command, says, mistakes, monkeypatch):
    """Exit code 2, one line, as the README says it, and nothing left behind or changed."""
    monkeypatch.chdir(mistakes)
    before = everything_in(mistakes)
    script, *flags = shlex.split(command)
    outcome = call(script, *flags)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {says}")
    assert outcome.err.count("\n") == 1
    assert "settings\n" not in outcome.out  # the line stands alone, not below forty others
    assert everything_in(mistakes) == before


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            goal = page.parent / path if path else page
            assert goal.exists(), f"{page.name}: {path}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{page.name}: {anchor}"


def test_there_are_errors():
    assert len(error_rows()) >= 40
