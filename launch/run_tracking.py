"""What of a run goes to MLflow: one run a stage under one parent, the data, the figures, the registered model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launch.parts import Part
from launch.prepare import Prepared, fingerprint_of
from launch.report import open_report
from launch.sheet import sheet_of
from launch.version import code_version
from lce_dist.compat.artefact import CARD as BRIDGE_CARD
from lce_dist.compat.artefact import WEIGHTS as BRIDGE_WEIGHTS
from lce_dist.config import Config, Judged
from lce_dist.evaluation.figures import training_curves
from lce_dist.evaluation.matrix import PAIRS
from lce_dist.tracking import Tracker

CANDIDATE = "candidate"  # the alias of the model registered last; ``lce gate`` moves the one that is shipped
_CLOSE_S = 60.0
_UNKNOWN = "?"


class RunTracking:
    """A run as MLflow sees it, event by event."""

    def __init__(self, tracker: Tracker, run_dir: Path) -> None:
        self.tracker = tracker
        self._run_dir = run_dir
        # of an earlier driver: a stage that was never ended here may have been finished by workers that outlived it
        heard = tracker.heard()
        self.told_steps = {key: one.last_step for key, one in heard.items() if key != "parent"}
        # a driver before this one may have left a warning on the run
        self._warning: str | None = _UNKNOWN if heard else None
        self._open_stages = {key for key, one in heard.items() if key != "parent" and not one.has_ended}

    def open(self, config: Config, prepared: Prepared, num_nodes: int, num_ranks: int) -> None:
        """Start, or go on with, the parent run: settings, data, the machine's load."""
        tracker, split, dataset = self.tracker, prepared.split, prepared.dataset
        tracker.start_run(
            "parent", config.run.name, tags={"lce.fingerprint": fingerprint_of(prepared.identity(config))}
        )
        tracker.set_tags("parent", {"lce.num_nodes": num_nodes, "lce.num_ranks": num_ranks, "lce.code": code_version()})
        tracker.log_params("parent", _flat(config.training_values() | config.evaluation_values()))
        tracker.log_params(
            "parent",
            {
                "data.num_images": dataset.num_samples,
                "data.num_train_identities": len(split.train),
                "data.num_old_identities": len(split.old),
                "data.num_heldout_identities": len(split.heldout),
                "data.fingerprint": dataset.fingerprint[:16],
            },
        )
        source = config.data.images or config.data.shards or "drawn"
        told: tuple[tuple[str, Part, str], ...]
        told = (
            ("old model", "old", "training"),
            ("new model", "train", "training"),
            ("held out", "heldout", "evaluation"),
        )
        for part, which, context in told:
            view = prepared.parts.view(which)
            profile = {"images": view.num_samples, "identities": view.num_classes, "image_size": config.data.image_size}
            tracker.log_input("parent", part, view.fingerprint[:16], context, source, profile)
        resolved = self._run_dir / "resolved.json"
        resolved.write_text(json.dumps(config.model_dump(mode="json"), indent=2))
        tracker.log_file("parent", resolved, "config")
        tracker.monitor("parent")
        sheet = self._run_dir / "figures" / "contact_sheet.png"
        if config.data.synthetic is not None and not sheet.exists():
            # drawn faces belong to nobody; people's own images are not copied into MLflow
            sheet.parent.mkdir(exist_ok=True)
            sheet_of(dataset, 8, 8, 64).save(sheet)
            tracker.log_file("parent", sheet, "figures")

    def follow(self, event: dict[str, Any]) -> None:
        """Pass on what the workers report."""
        kind, stage = event["type"], event.get("stage")
        if stage is None:
            return
        if kind == "stage_start":
            self.tracker.start_run(stage, stage, parent="parent")
            self._open_stages.add(stage)
        elif kind == "points" and event["points"]:
            if stage not in self._open_stages:
                self.tracker.start_run(stage, stage, parent="parent")
                self._open_stages.add(stage)
            for point in event["points"]:
                self.tracker.log_metrics(stage, point["metrics"], point["step"], point["time_ms"])
        elif kind == "metrics" and event["metrics"]:
            self.tracker.log_metrics(stage, event["metrics"], event["step"])
        elif kind == "profile":
            for file in event["files"]:
                self.tracker.log_file(stage, Path(file), "profiles")
        elif kind == "beside":
            self.tracker.log_metrics(stage, event["metrics"], event["step"])
            if event["warning"] != self._warning:
                self._warning = event["warning"]
                self.tracker.set_tags("parent", {"lce.warning": self._warning or ""})
        elif kind == "code_changed":
            self.tracker.set_tags("parent", {"lce.code_changed": event["text"]})
        elif kind in ("stage_done", "stage_skipped") and stage in self._open_stages:
            model, bridge = self._run_dir / stage / "model.safetensors", self._run_dir / "bridge"
            if model.exists():
                self.tracker.log_file(stage, model, "model")
            if stage == "bridge" and bridge.exists():
                self.tracker.log_file(stage, bridge)
            self.tracker.end_run(stage)
            self._open_stages.remove(stage)

    def results(self, config: Config, gate: dict[str, Any]) -> None:
        """Numbers, description, figures and report on the parent run; the new model as a version in the registry."""
        report = open_report(self._run_dir)
        self.tracker.log_metrics("parent", result_metrics(report), report["revision"])
        tags = {"lce.space": report["space"], "lce.parent_space": report["parent_space"]}
        self.tracker.set_tags("parent", tags | gate_tags(report, gate, config))
        for figure in sorted((self._run_dir / "figures").glob("*.png")):
            if figure.name != "contact_sheet.png":
                self.tracker.log_file("parent", figure, "figures")
        for name in ("report.html", "report.json", "gate.json"):
            self.tracker.log_file("parent", self._run_dir / name)
        key = registered_by(self._run_dir)
        if key is not None:
            self._register(key, config, report, gate)

    def _register(self, key: str, config: Config, report: dict[str, Any], gate: dict[str, Any]) -> None:
        """The version's folder holds all that serving takes: weights, the map where there is one, and how to apply it."""
        weights = self._run_dir / "new" / "model.safetensors"
        if config.new.weights is not None:
            weights = Path(config.new.weights)
            self.tracker.log_file(key, weights, "model")
        if report["bridge"] is not None:
            for name in (BRIDGE_WEIGHTS, BRIDGE_CARD):
                self.tracker.log_file(key, self._run_dir / "bridge" / name, "model/bridge")
        far = repr(float(report["criterion_far"]))
        thresholds = {key: report[key]["threshold_at_far"][far] for key in ("new_old", "new_new")}
        card = {
            "net": config.new.net,
            "weights": weights.name,
            "embedding_dim": config.new.embedding_dim,
            "image_size": config.data.image_size,
            "space": report["space"],
            "parent_space": report["parent_space"],
            "mode": report["mode"],
            "method": report["method"],
            "bridge": None if report["bridge"] is None else report["bridge"]["kind"],
            "apply": _how_to_apply(report),
            "threshold_new_old": thresholds["new_old"],
            "threshold_new_new": thresholds["new_new"],
            "threshold_far": report["criterion_far"],
            "fingerprint": report["fingerprint"],
        }
        self.tracker.log_text(key, json.dumps(card, indent=2), "model/card.json")
        size = config.data.image_size
        self.tracker.register_model(
            key,
            config.tracking.model or config.run.name,
            "model",
            {"images": (-1, 3, size, size)},
            {"vectors": (-1, config.new.embedding_dim)},
            version_text(gate),
            {name: value for name, value in card.items() if value is not None},
            (CANDIDATE,),
        )

    def close(self, status: str) -> bool:
        """End every open run; whether MLflow has everything."""
        for stage in (*self._open_stages, "parent"):
            self.tracker.end_run(stage, status)
        return self.tracker.close(_CLOSE_S if status == "FINISHED" else 5.0)


def registered_by(run_dir: Path) -> str | None:
    """The stage whose run in MLflow the model's version is of: the training, or the map of two models that were given."""
    if (run_dir / "new" / "model.safetensors").exists():
        return "new"
    return "bridge" if (run_dir / "bridge" / BRIDGE_CARD).exists() else None


def _how_to_apply(report: dict[str, Any]) -> str | None:
    """In words: which vectors go through the map of the version's folder, and when."""
    if report["bridge"] is None:
        return None
    through = "unit vectors through bridge/ (lce_dist.compat.artefact: read_bridge, map_rows), then unit length again"
    if report["mode"].endswith("direct"):
        return f"every vector of this model: {through}; only then compare it with anything"
    if report["bridge"]["direction"] == "new_to_old":
        return f"to compare with old vectors, this model's: {through}; among themselves its vectors are compared as they are"
    return f"to compare with this model's vectors, the old ones: {through}; this model's stay as they are"


def draw_curves(run_dir: Path) -> None:
    """Loss terms of each trained stage, read back from the events that were kept for MLflow."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    with (run_dir / "tracking.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                event = json.loads(line)
                if event.get("kind") == "metrics":
                    for name, value in event["metrics"].items():
                        if name.startswith("loss/"):
                            points = series.setdefault(event["key"], {}).setdefault(name.removeprefix("loss/"), {})
                            points[event["step"]] = value
    for stage, curves in series.items():
        # the two terms of compatibility are a hundredth of the classification loss: a picture of their own
        for suffix, names in (("", ("total", "classification")), ("_compatibility", ("alignment", "boundary"))):
            shown = {name: sorted(curves[name].items()) for name in names if name in curves}
            if shown:
                figure = training_curves(shown, f"{stage} model: {' and '.join(shown)}", "loss")
                figure.savefig(run_dir / "figures" / f"losses_{stage}{suffix}.png", dpi=150)


def gate_tags(report: dict[str, Any], gate: dict[str, Any], config: Judged) -> dict[str, str]:
    """What the run's page says of a verdict: the description, the word, the reasons."""
    failed = "; ".join(f"{check['name']}: {check['reached']}" for check in gate["checks"] if not check["passed"])
    return {
        "mlflow.note.content": _description(report, gate, config),
        "lce.gate": "passed" if gate["passed"] else "not passed",
        "lce.gate.reasons": failed,
    }


def version_text(gate: dict[str, Any]) -> str:
    """The description of the registered version, in Markdown."""
    return "\n\n".join(f"**{question}** {_cell(answer)}" for question, answer in gate["answers"].items())


def result_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The report's numbers by their names in MLflow."""
    metrics: dict[str, float | None] = {
        "result/criterion_met": report["criterion_met"] and float(report["criterion_met"]),
        "result/update_gain": report["update_gain"],
        "result/confidence": report["confidence"],
    }
    for key in PAIRS:
        if key in report:
            metrics[f"rank1/{key}"] = report[key]["rank1"]
            for far, value in report[key]["tar_at_far"].items():
                metrics[f"tar_at_far_{far}/{key}"] = value
    for key, entry in report["procrustes"].items():
        for far, value in entry["tar_at_far"].items():
            metrics[f"tar_at_far_{far}/{key}_rotated"] = value
    for name, entry in report.get("pairs", {}).items():
        for key, cell in entry.items():
            metrics[f"pairs_{name}/accuracy_{key}"] = cell["accuracy"]
    for name, flips in report["flips"].items():
        metrics[f"flips/{name}_negative"] = flips["negative_rate"]
        metrics[f"flips/{name}_positive"] = flips["positive"] / flips["num_genuine"]
    for key, kept in report["old_threshold_kept"].items():
        metrics[f"old_threshold_kept/far_{key}"] = kept["far"]
    for order, curve in (report["backfill"] or {"orders": {}})["orders"].items():
        metrics[f"backfill/area_{order}"] = curve["area"]
    for name in ("p_comp", "p_up", "p_1"):
        metrics[f"result/{name}"] = report["p_scores"] and report["p_scores"][name]
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _description(report: dict[str, Any], gate: dict[str, Any], config: Judged) -> str:
    far = repr(float(report["criterion_far"]))
    old, new = config.model_names
    rows = [
        f"| {query} | {gallery} | {report[key]['tar_at_far'][far]:.3f} | {report[key]['rank1']:.3f} | "
        f"{report[key]['threshold_at_far'][far]:.4f} |"
        for key, (query, gallery) in PAIRS.items()
        if key in report
    ]
    words = {True: "passed", False: "**failed**", None: "**not known**"}
    checks = [
        f"| {_cell(check['name'])} | {check['asked']} | {check['reached']} | {words[check['passed']]} |"
        for check in gate["checks"]
    ]
    by_hand = ", by rules set by hand" if gate["overridden"] else ""
    lines = [f"**{'Safe to ship' if gate['passed'] else 'Do not ship'}**{by_hand}: `{old}` to `{new}`.", ""]
    for question, answer in gate["answers"].items():
        lines += [f"**{question}** {_cell(answer)}", ""]
    lines += [f"| query | gallery | TAR at FAR {far} | rank-1 | threshold |", "|---|---|---|---|---|", *rows, ""]
    lines += ["| check | asked | reached | |", "|---|---|---|---|", *checks]
    return "\n".join([*lines, "", "The whole report is the artifact report.html."])


def _cell(text: str) -> str:
    """A text of people's data in a Markdown table."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", text)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
