"""The report as one HTML page that needs nothing else: answers first, then numbers and pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lce_dist.evaluation.answers import Answers
from lce_dist.evaluation.gate import GateVerdict
from lce_dist.evaluation.matrix import PAIRS

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; }
.verdict { display: inline-block; padding: .3rem .9rem; border-radius: .3rem; color: #fff; font-weight: 700; margin: .8rem 0; }
.yes { background: #1b7837; } .no { background: #b2182b; } .unknown { background: #8c6d1f; }
dt { font-weight: 700; margin-top: .7rem; } dd { margin: 0; }
table { border-collapse: collapse; font-size: .92rem; } th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #eee; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr.bad td { color: #b2182b; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption, .small { color: #555; font-size: .88rem; }
.wide { overflow-x: auto; } td { overflow-wrap: break-word; }
@media (max-width: 40rem) { body { padding: .8rem; } td, th { padding-right: .5rem; } }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""

_PICTURES = (
    ("matrix", "Query model in rows, gallery model in columns. The framed cell is what ships."),
    (
        "groups",
        "Every group at the thresholds that hold for all images; the line goes from the old state to the shipped one.",
    ),
    ("flips", "Genuine pairs whose decision changes."),
    ("backfill", "What re-encoding a part of the gallery already gives."),
    ("similarities", "Scores of genuine and impostor pairs, with each pair's own threshold."),
    ("roc", "Share of genuine pairs accepted over share of impostor pairs accepted."),
    ("det", "The same errors, both axes logarithmic."),
)


def html_report(
    name: str,
    report: Mapping[str, Any],
    verdict: GateVerdict,
    answers: Answers,
    figures: Path,
    overridden: Sequence[str] = (),
) -> str:
    """The whole page; pictures are those PNGs of ``figures`` that are there, and the losses of every stage.

    overridden: what of the config's gate was set by hand.
    """
    word, kind = ("safe to ship", "yes") if verdict.passed else ("do not ship", "no")
    if not verdict.checks:
        word, kind = "not judged", "unknown"
    if overridden:
        word += ", by rules set by hand"
    far = repr(float(report["criterion_far"]))
    parts = [
        f"<h1>Upgrade report: {_text(name)}</h1>",
        f'<div class="verdict {kind}">{word}</div>',
        "<dl>" + "".join(f"<dt>{_text(q)}</dt><dd>{_text(a)}</dd>" for q, a in answers.rows()) + "</dl>",
        "<h2>The gate</h2>",
        _table(
            ("check", "asked", "reached", ""),
            (
                (
                    (
                        c.name,
                        c.asked,
                        c.reached,
                        "passed" if c.passed else "failed" if c.passed is False else "not known",
                    ),
                    not c.passed,
                )
                for c in verdict.checks
            ),
        ),
        "<h2>The matrix</h2>",
        _matrix(report),
        f'<p class="small">Intervals at 95 %, at FAR {far}, over identities drawn again '
        f"({report['images_drawn_for_intervals']:,} of {report['num_heldout_images']:,} images). {_text(' '.join(report['reasons']))}</p>",
    ]
    if "procrustes_note" in report:
        parts.append(f'<p class="small">{_text(report["procrustes_note"])}</p>')
    if report["old_threshold_kept"]:
        parts += ["<h2>Thresholds and decisions that change</h2>", _kept(report, far), _flips(report)]
    if report["p_scores"] is not None:
        parts.append(_p_scores(report["p_scores"]))
    if report.get("pairs"):
        parts += ["<h2>Pair files</h2>", _pairs(report)]
    for stem, caption in _PICTURES:
        parts.append(_picture(figures / f"{stem}.png", caption))
    if report["slices"]:
        parts += ["<h2>Groups</h2>", _groups(report)]
    losses = sorted(figures.glob("losses_*.png"))
    if losses:
        parts.append("<h2>Training</h2>")
        parts += [_picture(path, path.stem.removeprefix("losses_").replace("_", ", ")) for path in losses]
    parts += (
        ["<h2>The vectors</h2>", _vectors(report)] if "vectors" in report else ["<h2>The run</h2>", _run_facts(report)]
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Upgrade report: {_text(name)}</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _matrix(report: Mapping[str, Any]) -> str:
    fars = list(report["new_new"]["tar_at_far"])
    far = repr(float(report["criterion_far"]))
    rows = []
    names = {key: f"{query} in {gallery}" for key, (query, gallery) in PAIRS.items()}
    entries = [(names[key], report[key], report["intervals"].get(key)) for key in PAIRS if key in report]
    entries += [
        (f"{key.removesuffix('_old')}, only rotated, in old", entry, None)
        for key, entry in report.get("procrustes", {}).items()
    ]
    for name, entry, interval in entries:
        spread = "" if interval is None else f"{interval['low']:.3f} to {interval['high']:.3f}"
        cells = [name, *(f"{entry['tar_at_far'][each]:.4f}" for each in fars), spread, f"{entry['rank1']:.4f}"]
        rows.append(((*cells, f"{entry['threshold_at_far'][far]:.4f}"), False))
    heads = ("query in gallery", *(f"TAR at FAR {each}" for each in fars), "interval", "rank-1", f"threshold for {far}")
    return _table(heads, rows, first_number=1)


def _kept(report: Mapping[str, Any], far: str) -> str:
    before = report["old_old"]["tar_at_far"][far]
    rows = [
        (
            (
                " in ".join(PAIRS[key]),
                f"{one['threshold']:.4f}",
                f"{report[key]['tar_at_far'][far]:.4f}",
                f"{one['old_threshold']:.4f}",
                f"{one['far']:.2g}",
                f"{one['tar']:.4f}",
            ),
            one["far"] > 2.0 * float(far) or one["tar"] < before,
        )
        for key, one in report["old_threshold_kept"].items()
    ]
    heads = ("query in gallery", f"threshold for FAR {far}", "TAR", "old threshold", "FAR with it", "TAR with it")
    return _table(heads, rows, first_number=1)


def _flips(report: Mapping[str, Any]) -> str:
    rows = [
        (
            (
                {"shipped": "with the gallery as it is", "re_encoded": "once it is re-encoded"}[name],
                f"{100.0 * one['negative_rate']:.2f} %",
                f"{100.0 * one['positive'] / one['num_genuine']:.2f} %",
                f"{one['num_genuine']:,}",
            ),
            False,
        )
        for name, one in report["flips"].items()
    ]
    return _table(("genuine pairs", "accepted before, rejected now", "the other way round", "of"), rows, first_number=1)


def _p_scores(scores: Mapping[str, Any]) -> str:
    words = [
        f"{label} {'not defined' if scores[key] is None else format(scores[key], '.4f')}"
        for key, label in (("p_comp", "P-comp"), ("p_up", "P-up"), ("p_1", "P-1"))
    ]
    without = ", ".join(scores["undefined"])
    more = (
        f" There is no update gain on {without}, where a new model alone is no better than the old." if without else ""
    )
    return (
        '<p class="small">P-scores over all test sets, means of sigmoids, in which 0.5 is no change: '
        f"{_text(', '.join(words))}.{_text(more)}</p>"
    )


def _pairs(report: Mapping[str, Any]) -> str:
    rows = [
        (
            (
                name,
                " in ".join(PAIRS[key]),
                f"{cell['num_pairs']:,}",
                f"{cell['accuracy']:.4f} ± {cell['accuracy_std']:.4f}",
                f"{cell['equal_error_rate']:.4f}",
                *(f"{tar:.4f}" for tar in cell["tar_at_far"].values()),
            ),
            False,
        )
        for name, entry in report["pairs"].items()
        for key, cell in entry.items()
    ]
    fars = next(iter(next(iter(report["pairs"].values())).values()))["tar_at_far"]
    heads = (
        "file",
        "query in gallery",
        "pairs",
        "accuracy, 10 folds",
        "equal error rate",
        *(f"TAR at FAR {each}" for each in fars),
    )
    return _table(heads, rows, first_number=2)


def _groups(report: Mapping[str, Any]) -> str:
    rows = []
    for one in report["slices"]:
        tar = one["tar"]
        gain, known = tar["new_old"] - tar["old_old"], one["gain"]
        flips = one["flips"].get("shipped")
        cells = (
            one["column"],
            one["value"],
            f"{one['num_images']:,}",
            f"{tar['old_old']:.4f}",
            f"{tar['new_old']:.4f}",
            f"{gain:+.4f}",
            "" if known is None else f"{known['low']:+.3f} to {known['high']:+.3f}",
            f"{tar['new_new']:.4f}",
            "" if one["update_gain"] is None else f"{one['update_gain']:.2f}",
            "" if one["far"]["new_old"] is None else f"{one['far']['new_old']:.2g}",
            f"{100.0 * flips['negative_rate']:.2f} %",
        )
        rows.append((cells, known is not None and known["high"] < 0.0))
    heads = (
        "column",
        "group",
        "images",
        "old/old",
        "new/old",
        "gain",
        "interval",
        "new/new",
        "update gain",
        "FAR in the group",
        "lost pairs",
    )
    note = (
        "Intervals hold for all groups at once in 95 % of samples of identities; red: below 0 as a whole. Groups with genuine "
        "pairs of fewer than 10 identities have none."
    )
    return f'{_table(heads, rows, first_number=2)}<p class="small">{note}</p>'


def _run_facts(report: Mapping[str, Any]) -> str:
    method = report["method"] or "a map between two trained models"
    facts = {
        "manner": f"{report['mode']}, {method}",
        "ranks": f"{report['num_ranks']} on {report['num_nodes']} nodes",
        "speed": f"{report['images_per_s']:.0f} images/s of the new model",
        "fingerprint": report["fingerprint"],
    }
    return _table(("", ""), (((key, str(value)), False) for key, value in facts.items()))


def _vectors(report: Mapping[str, Any]) -> str:
    rows = [
        (
            (
                name,
                Path(one["file"]).name,
                f"{one['num_rows']:,}",
                str(one["dim"]),
                one["space"] or "not said",
                f"{one['left_out']:,}",
            ),
            False,
        )
        for name, one in report["vectors"].items()
    ]
    return _table(("model", "file", "vectors", "dimensions", "space", "not compared"), rows)


def _picture(path: Path, caption: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'


def _table(heads: Iterable[str], rows: Iterable[tuple[Iterable[str], bool]], first_number: int = 99) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if place >= first_number else ''}>{_text(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    body = "".join(f"<tr{' class=bad' if bad else ''}>{row(cells, 'td')}</tr>" for cells, bad in rows)
    return f"<div class=wide><table><thead><tr>{row(heads, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: str) -> str:
    return html.escape(value)
