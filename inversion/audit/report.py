"""What a run leaves behind: its scores, result.json, losses.csv and pictures."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from inversion.audit.attack import Attacked
from inversion.audit.certificate import Certificate
from inversion.audit.controls import NOT_RUN, Controls
from inversion.audit.information import gradient_information_ratio
from inversion.audit.inputs import LPIPS_HINT, Case, Sealed, public_images
from inversion.audit.scoring import Doubts, Rules, score_images
from inversion.audit.settings import ScoringSettings, Settings
from inversion.audit.tables import information_table, label_table, score_table
from inversion.audit.threat import threat_model
from inversion.audit.truth import Finish, arrival, second_half_fall
from inversion.audit.updates import update_entry, update_model_of
from inversion.audit.verdict import ALPHA
from inversion.layerwise.attack import Recovered
from inversion.layerwise.images import decoded
from inversion.settings import AttackSettings
from utils import metrics
from utils.console import Reporter, duration
from utils.device import device_name
from utils.files import null_if_nan, null_unless_finite, write_csv, write_json
from utils.matching import label_numbers
from utils.pictures import (
    save_choices,
    save_controls,
    save_decoys,
    save_layers,
    save_losses,
    save_pairs,
    save_panels,
)
from utils.script import git_revision, versions
from utils.tensor_files import save

#: Of result.json: raised by one whenever a reader of the number before could misread it.
RESULT_FORMAT = 1
#: Public photographs that the decoders of the picture of all layers learn from.
DECODED_BY = 300


def notes(settings: Settings, case: Case, sealed: Sealed | None) -> list[str]:
    """Return what a reader should know before the attack, a line each."""
    scoring, lines = settings.scoring, []
    if scoring.metric and sealed is not None:
        assert sealed.check is not None  # load_inputs saw to it
        mark = "" if sealed.check.fits else "warning: "
        lines.append(f"{mark}{sealed.check.finding}")
        if sealed.lpips_score is None:
            lines.append(LPIPS_HINT)
    if scoring.by_index and not scoring.metric:
        lines.append("note: --one-to-one-similarity says how --metric pairs; it is not given")
    return lines


def label_lines(scoring: ScoringSettings, case: Case, sealed: Sealed | None) -> list[str]:
    """Describe the labels from the gradient, with the true ones where scoring may see them."""
    found = case.labels
    if found is None:
        return []
    true = _true_labels(scoring, sealed)
    text = label_table(found.labels, found.lower_bounds, certain=found.certain, y_true=true)
    regime = f", {found.regime} regime" if found.regime else ""
    lines = [
        f"labels from the gradient: {found.method} ({found.reason}){regime}, "
        f"{found.seconds:.2f} s\n{text}"
    ]
    if scoring.by_index and scoring.metric:
        lines.append(
            "note: reconstructed labels are in ascending order, so pairing by index compares "
            "images of different labels unless the true ones are sorted too"
        )
    return lines


def _true_labels(scoring: ScoringSettings, sealed: Sealed | None) -> Tensor | None:
    """Return the true labels, (B,), where they are scored."""
    return sealed.truth.y if sealed is not None and scoring.metric else None


def information_entry(case: Case, sealed: Sealed) -> tuple[dict, str]:
    """Compute the gradient information ratio: its entry of result.json, and a table to print."""
    start = time.perf_counter()
    truth, target = sealed.truth, case.target
    found = gradient_information_ratio(
        case.objective.model,
        sealed.images_for(case),
        truth.y.to(case.device),
        target.loss,
        case.objective.batch_shard,
    )
    columns = {"label": truth.y.tolist()} | {
        name: value.tolist() for name, value in vars(found).items() if isinstance(value, Tensor)
    }
    seconds = time.perf_counter() - start
    text = information_table(
        columns,
        found.batch_norm,
        independent=found.independent,
        protected=case.protected,
    )
    figures = {"batch_norm": found.batch_norm, "independent": found.independent}
    return {**columns, **figures, "seconds": seconds}, f"{text}\ncomputed in {duration(seconds)}"


# Scores ------------------------------------------------------------------------------------


def finish_of(settings: AttackSettings, case: Case, sealed: Sealed, attacked: Attacked) -> Finish:
    """Follow the chosen run to its end, and evaluate the objective at the truth."""
    falls = [second_half_fall(losses) for losses in attacked.gradient_losses(settings)]
    fall = max((fall for fall in falls if fall is not None), default=None)
    final = attacked.outcome.final
    objective = case.objective.at_place(final.losses.alpha)
    at = arrival(objective, final.x.to(case.device), sealed.images_for(case), sealed.truth.y)
    found = attacked.recovered
    return Finish(fall, at, final.stopped, None if found is None else found.stopped)


def score(
    scoring: ScoringSettings,
    case: Case,
    sealed: Sealed,
    attacked: Attacked,
    finish: Finish,
    controls: Controls = NOT_RUN,
    *,
    tests: int = 1,
) -> tuple[dict, str]:
    """Score the reconstruction: the entry `metrics` of result.json, and what to print of it.

    tests: attacks of which the strongest verdict will count.
    """
    truth, check, doubt = sealed.truth, sealed.check, finish.doubt
    assert check is not None  # load_inputs saw to it
    if check.kind == "protected" and not sealed.bound:
        doubt = "nothing binds the truth to what was attacked, which was protected"
    if not check.fits:
        doubt = "what was attacked is not the truth's gradient, so that nothing follows"
    scores = score_images(
        attacked.images,
        sealed.colours,
        case.y,
        truth.y,
        Rules(
            scoring.by_index, metrics.SSIMS[scoring.ssim], sealed.lpips_score,
            scoring.verdict_metric,
        ),
        controls=controls.images,
        decoys=truth.decoys,
        doubts=Doubts(controls.missing, doubt, finish.arrival.arrived, tests),
    )  # fmt: skip
    reason = finish.reason
    figures = {
        "loss_fall": finish.fall,
        "arrived": finish.arrival.arrived,
        "reason": reason,
        "objective": finish.arrival.reconstruction.total,
        "objective_at_truth": finish.arrival.truth.total,
        "gradient_loss_at_truth": finish.arrival.truth.gradient,
    }
    scores["attack"] = null_unless_finite(figures)
    scores["truth_gradient"] = asdict(check) | {"fits": check.fits, "bound": sealed.bound}
    lines = [score_table(scores)]
    p = scores["verdict"]["p"]
    if p is not None and p > ALPHA:
        lines.append(f"why it found no more: {reason}")
    protection = case.target.protection
    if protection is not None:
        lines.append(f"the client's protection ({protection.mode}): {'; '.join(case.guarantee)}")
    elif case.protected:
        lines.append(f"the client's protection: withheld; {case.withheld['protection']}")
    return scores, "\n".join(lines)


# Files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Writes what a run leaves behind into its folder, figures before pictures."""

    folder: Path
    settings: Settings
    case: Case
    sealed: Sealed | None
    #: The entry `information` of result.json.
    information: Mapping | None
    #: The entry `search` of result.json.
    search: Mapping | None

    def save_consensus(self, done: int, x: Tensor) -> None:
        """Write the picture of a consensus formed after `done` iterations of every seed."""
        path = self.folder / "consensus" / f"{done:06d}.png"
        save_panels([(f"iteration {done}", self.case.images(x))], path)

    def write_attack(
        self, attacked: Attacked, scores: dict | None, certificate: Certificate | None
    ) -> None:
        """Write the reconstruction, losses.csv, result.json and the pictures of the attack."""
        folder, sealed = self.folder, self.sealed
        save(attacked.outcome.final.x.cpu(), str(folder / "x_recon.pth"))
        save(self.case.y, str(folder / "y_recon.pth"))
        write_csv(attacked.header, attacked.rows, folder / "losses.csv")
        self._write_result(attacked, scores, None, certificate)
        self._save_decoys(attacked, scores)
        true = None if sealed is None or scores is None else sealed.colours
        save_pairs(attacked.images, true, scores, folder)
        if attacked.rows:
            save_losses(attacked.header, attacked.rows, attacked.rounds, folder / "losses.png")
        if attacked.rounds:
            save_choices(attacked.rounds, folder / "choices.png")
        if attacked.recovered is not None:
            layers = decoded_layers(self.case, attacked.recovered)
            save_layers(attacked.images, true, layers, scores, folder / "layers.png")

    def write_controls(
        self,
        attacked: Attacked,
        scores: dict,
        controls: Controls,
        certificate: Certificate | None,
    ) -> None:
        """Rewrite result.json with the scores of the controls, and add their picture."""
        assert self.sealed is not None  # controls are scored
        self._write_result(attacked, scores, controls, certificate)
        self._save_decoys(attacked, scores)
        true = self.sealed.colours
        path = self.folder / "controls.png"
        save_controls(attacked.images, true, controls.images, scores, path)

    def _save_decoys(self, attacked: Attacked, scores: dict | None) -> None:
        if scores is None or self.sealed is None or self.sealed.truth.decoys is None:
            return
        truth = self.sealed.truth
        path = self.folder / "decoys.png"
        save_decoys(attacked.images, self.sealed.colours, truth.decoys, scores, path)

    def _write_result(
        self,
        attacked: Attacked,
        scores: dict | None,
        controls: Controls | None,
        certificate: Certificate | None,
    ) -> None:
        outcome, case = attacked.outcome, self.case
        losses = outcome.final.losses
        result = {
            "format": RESULT_FORMAT,
            "settings": self.settings.record,
            "target": _target_entry(case),
            "threat": threat_model(case, self.settings).entry,
            "versions": versions(),
            "git": git_revision(),
            "device": device_name(case.device),
            "processes": case.processes.size,
            "iterations": outcome.iterations,
            "bn_source": case.bn_source,
            "losses": null_unless_finite(
                {"gradient": losses.gradient, "total": losses.total, **losses.terms}
            ),
            "labels": self._label_entry(),
            "seeds": [
                {
                    "seed": self.settings.attack.first_seed + index,
                    "gradient_loss": null_unless_finite(run.losses.gradient),
                    "iterations": run.steps,
                    "stopped": run.stopped,
                    "reason": run.reason,
                }
                for index, run in enumerate(outcome.runs)
            ],
            "search": self.search,
            "metrics": null_if_nan(scores),
            "controls": controls
            and {
                name: {"iterations": control.iterations, "seconds": control.seconds}
                for name, control in controls.found.items()
            },
            "seconds": attacked.seconds,
            "iterations_per_second": outcome.iterations / attacked.seconds,
            "memory": None if case.memory is None else case.memory.entry,
            "peak_memory_mib": attacked.peak_memory_mib,
            "stopped": attacked.stopped,
            "information": null_unless_finite(self.information),
            "rounds": null_unless_finite(attacked.rounds),
            "layerwise": None if certificate is None else null_unless_finite(certificate.entry),
            "update": update_entry(
                update_model_of(self.settings.attack, case.target), case.target, losses.alpha
            ),
        }
        write_json(result, self.folder / "result.json")

    def _label_entry(self) -> dict:
        case, inputs = self.case, self.settings.inputs
        found = case.labels
        true = _true_labels(self.settings.scoring, self.sealed)
        accuracy = None
        if true is not None:
            accuracy = metrics.label_accuracy(*label_numbers(case.y, true))
        record: dict[str, Any] = {
            "method": "known" if inputs.labels is None else "given",
            "reconstructed": case.y,
            "true": true,
            "accuracy": accuracy,
        }
        if found is None:
            return record
        if true is not None:
            record["existence_accuracy"] = metrics.existence_accuracy(
                case.y, true, case.target.num_classes
            )
        bounds = found.lower_bounds
        return record | {
            "method": found.method,
            "reason": found.reason,
            "regime": found.regime,
            "lower_bounds": {int(k): int(bounds[k]) for k in bounds.nonzero().flatten()},
            "certain": found.certain,
            "seconds": found.seconds,
        }


def decoded_layers(case: Case, recovered: Recovered) -> dict[str, Tensor]:
    """Return the images (B, C, H, W) in [0, 1] that a decoder makes of every certified tensor."""
    model, target = case.objective.model, case.target
    public = public_images(DECODED_BY, target).to(case.device)
    names = [layer.name for layer in recovered.certified if layer.name in recovered.tensors]
    return {
        name: case.images(decoded(model, target, name, recovered.tensors[name], public))
        for name in names
    }


def _target_entry(case: Case) -> dict:
    target = case.target
    return {
        "arch": target.arch,
        "batch_size": target.batch_size,
        "image_shape": target.image_shape,
        "num_classes": target.num_classes,
        "train_mode": target.train_mode,
        "bn_statistics": target.bn_mean is not None,
        "replace_bn": target.replace_bn,
        "loss": target.loss_kind,
        "protection": None if target.protection is None else asdict(target.protection),
    }


def say_end(
    reporter: Reporter, attacked: Attacked, finish: Finish | None, text: str, controls: Controls,
    folder: Path | None,
) -> None:  # fmt: skip
    """Print the verdict with what stands behind it, and what the run took."""
    if finish is not None:
        reporter.say("\n".join([*finish.lines, text]))
    done = "iterations" if attacked.recovered is None else "tensors"
    amount, seconds = attacked.outcome.iterations, attacked.seconds
    reporter.say(f"{amount} {done} in {duration(seconds)}; written to {folder}")
    if controls.found:
        extra = sum(control.seconds for control in controls.found.values())
        reporter.say(f"controls: {duration(extra)} beside that; --no-controls leaves them out")
