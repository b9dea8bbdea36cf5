"""The command ``lce evaluate``: protocols over stored vectors of one model, or of a query model and a gallery model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.destinations import check_destination, write_whole
from launch.upgrade_cli import add_upgrade_action
from lce_dist.errors import ConfigError, DataError

if TYPE_CHECKING:  # heavy imports wait until a command needs them
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from launch.loaded_vectors import LoadedVectors
    from launch.protocol_files import PairList, PeopleList, TemplateList
    from lce_dist.evaluation.embeddings import EmbeddingSet
    from lce_dist.evaluation.verification import Roc

    Ints = npt.NDArray[np.int64]

_FILES = ".parquet (key, vector), .npz (keys, vectors), or .npy with NAME.keys.txt beside it"
_FEW = 10  # false accepts: a threshold of fewer moves by a third when the images are others
_BRIDGE_SIDE = {"new_to_old": "query", "old_to_new": "gallery"}


def add_evaluate_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``evaluate pairs | templates | identify | retrieve | all-pairs | upgrade | unpack-bin`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    evaluate = commands.add_parser(
        "evaluate",
        help="over stored vectors: the report of an upgrade, and protocols: 1:1 pairs, templates, 1:N, retrieval",
        description="Measure stored vectors by a public protocol; docs/protocols.md says how each counts, and what its\n"
        f"lists look like. Vectors: {_FILES}.",
        formatter_class=raw,
    )
    actions = evaluate.add_subparsers(required=True, metavar="ACTION")

    pairs = actions.add_parser(
        "pairs",
        help="1:1 on a list of pairs: TAR at FAR, equal error rate, accuracy by folds (LFW, CFP, AgeDB)",
        description="LIST: CSV with the line first,second,genuine (keys; 0 or 1), or LFW's pairs.txt. The first of a pair is\n"
        "a query, the second is in the gallery.",
        epilog="examples:\n"
        "  lce evaluate pairs lfw/pairs.csv --query new.parquet\n"
        "  lce evaluate pairs pairs.txt --query new.parquet --gallery old.parquet --bridge runs/mine/bridge --json -",
        formatter_class=raw,
    )
    pairs.add_argument("list", type=Path, metavar="LIST", help="the pairs")
    pairs.add_argument(
        "--folds", type=int, default=10, help="blocks of the list, 0 for none (default: 10, or LFW's own)"
    )
    pairs.add_argument("--suffix", default=".jpg", help="of LFW's keys NAME/NAME_0001.jpg (default: .jpg)")
    pairs.add_argument(
        "--old",
        type=Path,
        metavar="FILE",
        help="the old model's vectors: also count pairs whose decision changes from them",
    )
    _add_fars(pairs, "--far", (1e-3, 1e-2))
    _add_common(pairs, _pairs, keep=False)

    templates = actions.add_parser(
        "templates",
        help="1:1 on pairs of templates: media averaged, weighted by detector score (IJB-B, IJB-C)",
        description="LIST: CSV with the line first,second,genuine (template ids; 0 or 1).",
        epilog="example:\n"
        "  lce evaluate templates pairs.csv --templates templates.csv --query ijbc.npz --lengths keep --far 1e-4",
        formatter_class=raw,
    )
    templates.add_argument("list", type=Path, metavar="LIST", help="the pairs")
    _add_templates(templates, required=True)
    _add_fars(templates, "--far", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2))
    _add_common(templates, _templates, keep=True)

    identify = actions.add_parser(
        "identify",
        help="1:N in an open set: TPIR at FPIR, rank-k",
        description="Search every probe among the enrolled. A probe whose identity is not enrolled is a non-mated one.",
        epilog="example:\n"
        "  lce evaluate identify --probes probes.csv --enrolled enrolled.csv --query new.parquet --gallery old.parquet",
        formatter_class=raw,
    )
    people = "CSV with the line key,identity (a key, or a template id where --templates is given)"
    identify.add_argument("--probes", type=Path, required=True, metavar="LIST", help=people)
    identify.add_argument("--enrolled", type=Path, required=True, metavar="LIST", help=people)
    _add_templates(identify, required=False)
    identify.add_argument(
        "--enrolment",
        choices=("best", "mean"),
        default="best",
        help="an identity of several vectors scores by the best of them (default), or by their mean",
    )
    _add_fars(identify, "--fpir", (1e-2, 1e-1))
    _add_ranks(identify)
    _add_common(identify, _identify, keep=True)

    retrieve = actions.add_parser(
        "retrieve",
        help="retrieval: mAP, MAP@R, CMC; with cameras the rule of re-identification",
        description="Put the gallery in order for each query. Lists: CSV with the line key,identity or key,identity,camera.\n"
        "Without lists all vectors take part, and the files name the identities. Identity -1 is junk.",
        epilog="examples:\n"
        "  lce evaluate retrieve --query new.parquet --gallery old.parquet\n"
        "  lce evaluate retrieve --query reid.npz --query-list query.csv --gallery-list gallery.csv --plot cmc.png",
        formatter_class=raw,
    )
    retrieve.add_argument("--query-list", type=Path, metavar="LIST", help="the queries")
    retrieve.add_argument("--gallery-list", type=Path, metavar="LIST", help="the gallery")
    _add_ranks(retrieve)
    _add_common(retrieve, _retrieve, keep=False)

    everything = actions.add_parser(
        "all-pairs",
        help="every query against every gallery image: TAR at FAR, rank-1",
        description="The measure of lce train's report. The files, or one of them, name the identities.",
        epilog="example:\n  lce evaluate all-pairs --query new.parquet --gallery old.parquet --far 1e-6 1e-4",
        formatter_class=raw,
    )
    _add_fars(everything, "--far", (1e-4, 1e-3, 1e-2))
    everything.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default): a GPU if there is one, else all cores",
    )
    _add_common(everything, _all_pairs, keep=False)

    add_upgrade_action(actions)

    unpack = actions.add_parser(
        "unpack-bin",
        help="a .bin file of pairs (lfw.bin, agedb_30.bin) to images and pairs.csv; its pickle is not executed",
        epilog="example:\n  lce evaluate unpack-bin lfw.bin lfw/",
        formatter_class=raw,
    )
    unpack.add_argument("bin", type=Path, metavar="FILE.bin")
    unpack.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder")
    unpack.set_defaults(run=_unpack)


def _add_common(parser: argparse.ArgumentParser, run: Any, keep: bool) -> None:
    parser.add_argument("--query", type=Path, required=True, metavar="FILE", help="vectors of the query model")
    parser.add_argument("--gallery", type=Path, metavar="FILE", help="of the gallery model (default: the same file)")
    parser.add_argument("--bridge", type=Path, metavar="DIR", help="a map between the two, as RUN_DIR/NAME/bridge")
    parser.add_argument(
        "--map",
        choices=("query", "gallery"),
        help="what goes through it (default: query if it leads to the old model, else gallery)",
    )
    parser.add_argument(
        "--card",
        type=Path,
        metavar="FILE",
        help="report.json or card.json of the query model: which space it was trained for",
    )
    more = "; keep: longer ones weigh more in a template" if keep else ""
    parser.add_argument(
        "--lengths",
        choices=("unit", "normalise", "keep") if keep else ("unit", "normalise"),
        default="unit",
        help=f"unit (default): refuse vectors whose length is not 1; normalise: bring them to it{more}",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there; - for standard output")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.set_defaults(run=run)


def _add_fars(parser: argparse.ArgumentParser, flag: str, default: tuple[float, ...]) -> None:
    words = " ".join(f"{far:g}" for far in default)
    parser.add_argument(flag, type=float, nargs="+", default=default, metavar="RATE", help=f"(default: {words})")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, nargs="+", default=(1, 5, 10), metavar="K", help="(default: 1 5 10)")


def _add_templates(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--templates",
        type=Path,
        required=required,
        metavar="LIST",
        help="CSV with the line template_id,media_id,key or template_id,media_id,key,weight",
    )


@dataclass(frozen=True, eq=False)
class _Sides:
    """Vectors of queries and gallery; of one file it is the same object twice."""

    query: LoadedVectors
    gallery: LoadedVectors

    def image_numbers(self) -> tuple[Ints, Ints]:
        """A number for each row of the two, the same for the same key."""
        import numpy as np

        number_N = np.arange(len(self.query.row_of), dtype=np.int64)
        if self.gallery is self.query:
            return number_N, number_N
        first_new = len(number_N)
        numbers = (self.query.row_of.get(key, first_new + row) for key, row in self.gallery.row_of.items())
        return number_N, np.fromiter(numbers, dtype=np.int64, count=len(self.gallery.row_of))


def _pairs(arguments: argparse.Namespace) -> None:
    from launch.protocol_files import read_pairs
    from launch.protocol_intervals import drawn_pairs, pair_intervals, right_by_folds
    from lce_dist.evaluation.protocol_figures import curve_points, verification_curves
    from lce_dist.evaluation.verification import accuracy_by_folds, roc_of_scores, score_pairs

    _check(arguments, arguments.far)
    if arguments.folds < 0 or arguments.folds == 1:
        raise ConfigError(f"--folds is {arguments.folds}; must be 0 (none) or at least 2")
    sides = _load(arguments)
    listed = read_pairs(arguments.list, sides.query.known, sides.gallery.known, arguments.suffix)
    query, gallery = _all_rows(sides)
    score_P = score_pairs(query, gallery, listed.first_P, listed.second_P)
    roc = roc_of_scores(score_P, listed.genuine_P)
    rows, numbers = _verification(roc, listed.genuine_P, arguments.far)
    right_P = None
    if arguments.folds:
        accuracy = accuracy_by_folds(score_P, listed.genuine_P, arguments.folds, listed.fold_P)
        num_folds = len(accuracy.accuracy_K)
        rows.append((f"accuracy, {num_folds} folds", f"{accuracy.mean:.5f} +- {accuracy.std:.5f}"))
        numbers["accuracy"] = {
            "mean": accuracy.mean,
            "std": accuracy.std,
            "folds": accuracy.accuracy_K.tolist(),
            "thresholds": accuracy.threshold_K.tolist(),
        }
        right_P = right_by_folds(score_P, listed.genuine_P, accuracy.threshold_K, listed.fold_P)
    drawn = drawn_pairs(score_P, listed, sides.query.identities, sides.gallery.identities, sides.image_numbers())
    old_P = None
    if arguments.old is not None:
        old_P = _old_scores(arguments, sides, listed)
    pair_intervals(rows, numbers, drawn, arguments.far, right_P, old_P)
    title = f"1:1, {arguments.list.name}"
    points = curve_points(roc, numbers["num_impostor"])
    _tell(arguments, title, rows, numbers, lambda title: verification_curves(points, title))


def _old_scores(arguments: argparse.Namespace, sides: _Sides, listed: PairList) -> npt.NDArray[np.float64]:
    """Scores of the listed pairs by old vectors alone. Errors: DataError for an image that has none."""
    import numpy as np
    from rich.console import Console

    from launch.loaded_vectors import check_identities, load_vectors
    from launch.progress import RunProgress
    from lce_dist.evaluation.embeddings import EmbeddingSet
    from lce_dist.evaluation.verification import score_pairs

    with RunProgress(Console(stderr=True)) as progress:
        old = load_vectors(arguments.old, arguments.lengths, None, progress)
    rows = []
    for side, row_P in ((sides.query, listed.first_P), (sides.gallery, listed.second_P)):
        check_identities(side, old)
        keys = list(side.row_of)
        missing = next((row for row in row_P.tolist() if keys[row] not in old.row_of), None)
        if missing is not None:
            raise DataError(
                f"--old {old.path} lacks the key of row {missing + 1} of {side.path}, which the list names; must hold every image "
                "of the list. Embed it with the old model"
            )
        rows.append(np.array([old.row_of[keys[row]] for row in row_P.tolist()], dtype=np.int64))
    label_N = np.zeros(len(old.row_of), dtype=np.int64)
    one = EmbeddingSet(old.path.name, old.rows_ND, label_N, np.arange(len(label_N)))
    return score_pairs(one, one, rows[0], rows[1])


def _templates(arguments: argparse.Namespace) -> None:
    import numpy as np

    from launch.protocol_files import Known, read_pairs, read_templates
    from launch.protocol_intervals import drawn_pairs, pair_intervals, people_of_templates
    from lce_dist.evaluation.protocol_figures import curve_points, verification_curves
    from lce_dist.evaluation.verification import roc_of_scores, score_pairs

    _check(arguments, arguments.far)
    listed = read_templates(arguments.templates)
    known = Known(str(arguments.templates), listed.number_of)
    pairs = read_pairs(arguments.list, known, known)
    sides = _load(arguments)
    query = _pooled(sides.query, listed, pairs.first_P)
    gallery = _pooled(sides.gallery, listed, pairs.second_P)
    first_P = np.searchsorted(query.sample_ids_N, pairs.first_P)
    second_P = np.searchsorted(gallery.sample_ids_N, pairs.second_P)
    score_P = score_pairs(query, gallery, first_P, second_P)
    roc = roc_of_scores(score_P, pairs.genuine_P)
    rows, numbers = _verification(roc, pairs.genuine_P, arguments.far)
    numbers |= {"num_templates": len(listed.number_of), "weighted": listed.weight_R is not None}
    first, second = (people_of_templates(listed, one.row_of, one.identities) for one in (sides.query, sides.gallery))
    template_N = np.arange(len(listed.number_of))
    pair_intervals(rows, numbers, drawn_pairs(score_P, pairs, first, second, (template_N, template_N)), arguments.far)
    points = curve_points(roc, numbers["num_impostor"])
    title = f"1:1 of templates, {arguments.list.name}"
    _tell(arguments, title, rows, numbers, lambda title: verification_curves(points, title))


def _identify(arguments: argparse.Namespace) -> None:
    import numpy as np

    from launch.protocol_files import Known, read_people, read_templates, refuse_shared_images
    from launch.protocol_intervals import identification_intervals
    from lce_dist.evaluation.embeddings import EmbeddingSet
    from lce_dist.evaluation.identification import identify
    from lce_dist.evaluation.metrics import far_key
    from lce_dist.evaluation.protocol_figures import identification_curves

    _check(arguments, arguments.fpir, "--fpir", arguments.rank)
    if arguments.templates is None and arguments.lengths == "keep":
        raise ConfigError("--lengths is 'keep' without --templates; must be unit or normalise, as nothing is averaged")
    templates = None if arguments.templates is None else read_templates(arguments.templates)
    sides = _load(arguments)
    number_of: dict[str, int] = {}
    sets = []
    for path, vectors, image_N in zip(
        (arguments.probes, arguments.enrolled), (sides.query, sides.gallery), sides.image_numbers(), strict=True
    ):
        known = vectors.known if templates is None else Known(str(arguments.templates), templates.number_of)
        people = read_people(path, known)
        label_N = _numbers(people.identities, number_of)
        if templates is None:
            image_N = image_N[people.row_N]
            sets.append(EmbeddingSet(vectors.path.name, vectors.rows_ND[people.row_N], label_N, image_N))
        else:
            pooled = _pooled(vectors, templates, people.row_N)
            order_N = np.searchsorted(pooled.sample_ids_N, people.row_N)
            sets.append(EmbeddingSet(vectors.path.name, pooled.vectors_ND[order_N], label_N, people.row_N))
    if templates is not None:
        refuse_shared_images(templates, sets[0].sample_ids_N, sets[1].sample_ids_N)
    found = identify(sets[0], sets[1], arguments.enrolment)
    tpir_F, threshold_F = found.tpir_at(arguments.fpir)
    rows = [
        ("mated probes", f"{len(found.rank_M):,}"),
        ("non-mated probes", f"{found.num_nonmated:,}"),
        ("identities enrolled", f"{found.num_identities:,}"),
    ]
    for fpir, tpir, threshold in zip(arguments.fpir, tpir_F, threshold_F, strict=True):
        few = _few(fpir, found.num_nonmated, "non-mated probe")
        rows.append((f"TPIR at FPIR {far_key(fpir)}", f"{tpir:.5f} (threshold {threshold:.5f}{few})"))
    ranks = {str(k): found.rank_rate(k) for k in arguments.rank}
    rows += [(f"rank-{k}", f"{rate:.5f}") for k, rate in ranks.items()]
    keys = [far_key(fpir) for fpir in arguments.fpir]
    numbers = {
        "num_mated": len(found.rank_M),
        "num_nonmated": found.num_nonmated,
        "num_identities": found.num_identities,
        "enrolment": arguments.enrolment,
        "tpir_at_fpir": dict(zip(keys, tpir_F.tolist(), strict=True)),
        "threshold_at_fpir": dict(zip(keys, threshold_F.tolist(), strict=True)),
        "rank": ranks,
    }
    identification_intervals(rows, numbers, found, sets[0].labels_N, arguments.fpir, arguments.rank)
    title = f"1:N, {arguments.probes.name} among {arguments.enrolled.name}"
    _tell(arguments, title, rows, numbers, lambda title: identification_curves(found, title))


def _retrieve(arguments: argparse.Namespace) -> None:
    from launch.protocol_intervals import retrieval_intervals
    from lce_dist.evaluation.protocol_figures import retrieval_curve
    from lce_dist.evaluation.retrieval import retrieve

    _check(arguments, (), "--far", arguments.rank)
    if (arguments.query_list is None) != (arguments.gallery_list is None):
        raise ConfigError("--query-list and --gallery-list go together; give both, or none")
    sides = _load(arguments)
    if arguments.query_list is None:
        query, gallery = _all_rows(sides, _identities(sides, junk="-1"))
        cameras: tuple[Ints | None, Ints | None] = (None, None)
        title = "retrieval"
    else:
        query, gallery, cameras = _listed(arguments, sides)
        title = f"retrieval, {arguments.query_list.name} in {arguments.gallery_list.name}"
    found = retrieve(query, gallery, *cameras)
    ranks = {str(k): found.rank_rate(k) for k in arguments.rank}
    rows = [
        ("queries with a mate", f"{len(found.query_Q):,} of {found.num_queries:,}"),
        ("gallery images", f"{len(gallery.labels_N):,}"),
        ("mAP", f"{found.mean_average_precision:.5f}"),
        ("MAP@R", f"{found.map_at_r:.5f}"),
        *((f"rank-{k}", f"{rate:.5f}") for k, rate in ranks.items()),
    ]
    numbers = {
        "num_queries": found.num_queries,
        "num_queries_with_mate": len(found.query_Q),
        "num_gallery": len(gallery.labels_N),
        "cameras": cameras[0] is not None,
        "mean_average_precision": found.mean_average_precision,
        "map_at_r": found.map_at_r,
        "rank": ranks,
    }
    retrieval_intervals(rows, numbers, found, query.labels_N, arguments.rank)
    _tell(arguments, title, rows, numbers, lambda title: retrieval_curve(found, len(gallery.labels_N), title))


def _all_pairs(arguments: argparse.Namespace) -> None:
    import torch

    from lce_dist.evaluation.metrics import compare
    from lce_dist.evaluation.protocol_figures import verification_curves
    from lce_dist.world import World

    _check(arguments, arguments.far)
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise ConfigError("--device is cuda and PyTorch sees no GPU here; leave it out, or say cpu")
    device = torch.device("cuda" if has_gpu and arguments.device != "cpu" else "cpu")
    sides = _load(arguments)
    found = compare(*_all_rows(sides, _identities(sides)), arguments.far, World(device=device))
    rows = [("genuine pairs", f"{found.num_genuine:,}"), ("impostor pairs", f"{found.num_impostor:,}")]
    for key, tar in found.tar_at_far.items():
        few = _few(float(key), found.num_impostor, "impostor")
        rows.append((f"TAR at FAR {key}", f"{tar:.5f} (threshold {found.threshold_at_far[key]:.5f}{few})"))
    rows.append(("TAR moved by rounding, at most", f"{max(found.tar_error.values()):.1e}"))
    for key in found.coarse_at():
        sys.stderr.write(
            f"warning: at FAR {key} scores lie so close together that rounding them may move TAR by {found.tar_error[key]:.2g} and FAR by "
            f"{found.far_error[key]:.2g}; take the common direction out of the vectors\n"
        )
    rows.append(("rank-1", f"{found.rank1:.5f} of {found.num_ranked:,} queries"))
    numbers = {
        "num_genuine": found.num_genuine,
        "num_impostor": found.num_impostor,
        "tar_at_far": found.tar_at_far,
        "threshold_at_far": found.threshold_at_far,
        "tar_error_at_far": dict(found.tar_error),
        "far_error_at_far": dict(found.far_error),
        "exact_up_to_far": found.exact_up_to_far,
        "rank1": found.rank1,
        "num_ranked": found.num_ranked,
    }
    _tell(arguments, "all pairs", rows, numbers, lambda title: verification_curves(found.roc, title))


def _unpack(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from pipelines.pairs import PAIRS_FILE, unpack_pair_bin

    num_images, num_pairs = unpack_pair_bin(arguments.bin, arguments.out)
    Console(soft_wrap=True).print(
        f"{arguments.out}: {num_images:,} images; {PAIRS_FILE}: {num_pairs:,} pairs", highlight=False, markup=False
    )


def _check(
    arguments: argparse.Namespace, rates: Sequence[float], flag: str = "--far", ranks: Sequence[int] = ()
) -> None:
    for rate in rates:
        if not 0.0 < rate < 1.0:
            raise ConfigError(f"{flag} is {rate}; must be above 0 and below 1")
    for rank in ranks:
        if rank < 1:
            raise ConfigError(f"--rank is {rank}; must be at least 1")
    if arguments.bridge is not None and arguments.gallery in (None, arguments.query):
        raise ConfigError("--bridge stands between two models; give the other one's vectors with --gallery")
    if arguments.map is not None and arguments.bridge is None:
        raise ConfigError(f"--map {arguments.map} needs --bridge; name a folder that holds a map, or leave --map out")
    if arguments.bridge is not None and arguments.lengths == "keep":
        raise ConfigError("--lengths is 'keep' with --bridge; must be unit or normalise, as a map gives unit vectors")
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise ConfigError(f"--plot is {arguments.plot}; must end in .png")
    for name in ("json", "plot"):
        given = getattr(arguments, name)
        if given not in (None, "-"):
            check_destination(f"--{name}", given)


def _load(arguments: argparse.Namespace) -> _Sides:
    """Read the vectors and send one side through the map. Errors: DataError; CheckpointError of a damaged map."""
    from rich.console import Console

    from launch.loaded_vectors import check_identities, check_spaces, load_vectors
    from launch.progress import RunProgress
    from lce_dist.compat.artefact import read_bridge, read_card

    bridge, mapped = None, None
    if arguments.bridge is not None:
        card, bridge = read_card(arguments.bridge), read_bridge(arguments.bridge)
        mapped = arguments.map or _BRIDGE_SIDE[card["direction"]]
        sources = [arguments.query, arguments.gallery]
        check_spaces(card, *(sources if mapped == "query" else sources[::-1]))
    with RunProgress(Console(stderr=True)) as progress:
        query = load_vectors(arguments.query, arguments.lengths, bridge if mapped == "query" else None, progress)
        gallery = query
        if arguments.gallery not in (None, arguments.query):
            gallery = load_vectors(
                arguments.gallery, arguments.lengths, bridge if mapped == "gallery" else None, progress
            )
    dims = query.rows_ND.shape[1], gallery.rows_ND.shape[1]
    if dims[0] != dims[1]:
        names = [
            f"{one.path}{' (mapped)' if mapped == side else ''}"
            for one, side in ((query, "query"), (gallery, "gallery"))
        ]
        raise DataError(
            f"vectors {names[0]} have {dims[0]} dimensions and {names[1]} {dims[1]}; must be equal to be compared. Give "
            "--bridge a map between the two models"
        )
    sides = _Sides(query, gallery)
    check_identities(sides.query, sides.gallery)
    if bridge is None:
        _warn_of_spaces(sides, _parent_space(arguments.card, query))
    return sides


def _parent_space(card: Path | None, query: LoadedVectors) -> str | None:
    """The space that the query model was trained to be comparable with. Errors: ConfigError for no card, or another model's."""
    if card is None:
        return None
    try:
        said = json.loads(card.read_text(encoding="utf-8"))
        space, parent = said["space"], said["parent_space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--card {card} does not tell space and parent_space ({type(error).__name__}); name a run's report.json, or the "
            "card.json of a registered version"
        ) from None
    if query.space not in (None, space):
        raise ConfigError(
            f"--card {card} is of space {space!r}, the query's vectors are of {query.space!r}; give that model's"
        )
    return None if parent is None else str(parent)


def _warn_of_spaces(sides: _Sides, parent: str | None) -> None:
    """Say so where two files are of two spaces and nothing here connects them."""
    query, gallery = sides.query.space, sides.gallery.space
    if query != gallery and None not in (query, gallery):
        sys.stderr.write(f"spaces: query {query}, gallery {gallery}\n")
        if parent != gallery:
            sys.stderr.write(
                "warning: vectors of two spaces are compared as they are; what comes out means something only if the query "
                "model was trained to be comparable with the gallery's: --card names its card, --bridge a map\n"
            )


def _all_rows(sides: _Sides, labels: tuple[Ints, Ints] | None = None) -> tuple[EmbeddingSet, EmbeddingSet]:
    """Every vector of both sides; the same set twice where it is one file. Labels are zeros where none are given."""
    import numpy as np

    from lce_dist.evaluation.embeddings import EmbeddingSet

    numbers = sides.image_numbers()
    if labels is None:
        labels = np.zeros_like(numbers[0]), np.zeros_like(numbers[1])
    query = EmbeddingSet(sides.query.path.name, sides.query.rows_ND, labels[0], numbers[0])
    if sides.gallery is sides.query:
        return query, query
    return query, EmbeddingSet(sides.gallery.path.name, sides.gallery.rows_ND, labels[1], numbers[1])


def _identities(sides: _Sides, junk: str | None = None) -> tuple[Ints, Ints]:
    """Numbers of the identities that the files name; a file without them takes those of the same keys in the other.

    junk: of the identity that gets -1.
    """
    number_of: dict[str, int] = {}
    words = []
    for vectors, other in ((sides.query, sides.gallery), (sides.gallery, sides.query)):
        names = vectors.identities
        if names is None and other.identities is not None:
            missing = next((row for key, row in vectors.row_of.items() if key not in other.row_of), None)
            if missing is not None:
                raise DataError(
                    f"vectors {vectors.path} name no identities, and the key of row {missing + 1} is not in {other.path}; "
                    "must be in a file that does. Add a column identity"
                )
            names = [other.identities[other.row_of[key]] for key in vectors.row_of]
        if names is None:
            raise DataError(
                f"neither {sides.query.path} nor {sides.gallery.path} says who is on an image; add a column identity "
                "(npz: identities, npy: NAME.identities.txt)"
            )
        words.append(_numbers(names, number_of, junk))
    return words[0], words[1]


def _numbers(words: Sequence[str], number_of: dict[str, int], junk: str | None = None) -> Ints:
    """A number for each word, the same for the same word; -1 for ``junk``."""
    import numpy as np

    numbers = (-1 if word == junk else number_of.setdefault(word, len(number_of)) for word in words)
    return np.fromiter(numbers, dtype=np.int64, count=len(words))


def _listed(
    arguments: argparse.Namespace, sides: _Sides
) -> tuple[EmbeddingSet, EmbeddingSet, tuple[Ints | None, Ints | None]]:
    """The listed vectors of both sides, and their cameras."""
    from launch.protocol_files import read_people
    from lce_dist.evaluation.embeddings import EmbeddingSet

    number_of: dict[str, int] = {}
    camera_of: dict[str, int] = {}
    sets: list[EmbeddingSet] = []
    people: list[PeopleList] = []
    for path, vectors, image_N in zip(
        (arguments.query_list, arguments.gallery_list), (sides.query, sides.gallery), sides.image_numbers(), strict=True
    ):
        people.append(read_people(path, vectors.known))
        row_N = people[-1].row_N
        label_N = _numbers(people[-1].identities, number_of, junk="-1")
        sets.append(EmbeddingSet(vectors.path.name, vectors.rows_ND[row_N], label_N, image_N[row_N]))
    seen = [one.cameras for one in people]
    if (seen[0] is None) != (seen[1] is None):
        which = arguments.query_list if seen[0] is None else arguments.gallery_list
        raise DataError(f"{which} has no cameras, the other list has; must be in both, or in none")
    numbers = [None if one is None else _numbers(one, camera_of) for one in seen]
    return sets[0], sets[1], (numbers[0], numbers[1])


def _pooled(vectors: LoadedVectors, listed: TemplateList, template_P: Ints) -> EmbeddingSet:
    """The vectors of those templates that are asked for."""
    import numpy as np

    from lce_dist.evaluation.templates import pool_templates

    needed_T = np.zeros(len(listed.number_of), dtype=bool)
    needed_T[template_P] = True
    entries = np.flatnonzero(needed_T[listed.template_R])
    weight_R = None if listed.weight_R is None else listed.weight_R[entries]
    row_R = listed.rows(entries, vectors.known)
    return pool_templates(
        vectors.path.name,
        vectors.rows_ND,
        row_R,
        listed.template_R[entries],
        listed.media_R[entries],
        weight_R,
        listed.line_R[entries],
    )


def _verification(
    roc: Roc, genuine_P: npt.NDArray[np.bool_], fars: Sequence[float]
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Lines of the table, and the same numbers for JSON."""
    import numpy as np

    from lce_dist.evaluation.metrics import far_key

    num_genuine = int(np.count_nonzero(genuine_P))
    num_impostor = len(genuine_P) - num_genuine
    tar_F, threshold_F = roc.at(fars)
    rows = [("genuine pairs", f"{num_genuine:,}"), ("impostor pairs", f"{num_impostor:,}")]
    for far, tar, threshold in zip(fars, tar_F, threshold_F, strict=True):
        few = _few(far, num_impostor, "impostor")
        rows.append((f"TAR at FAR {far_key(far)}", f"{tar:.5f} (threshold {threshold:.5f}{few})"))
    rows.append(("equal error rate", f"{roc.equal_error_rate:.5f}"))
    keys = [far_key(far) for far in fars]
    return rows, {
        "num_genuine": num_genuine,
        "num_impostor": num_impostor,
        "tar_at_far": dict(zip(keys, tar_F.tolist(), strict=True)),
        "threshold_at_far": dict(zip(keys, threshold_F.tolist(), strict=True)),
        "equal_error_rate": roc.equal_error_rate,
    }


def _few(rate: float, count: int, what: str) -> str:
    """A hint where fewer than 10 false accepts of ``count`` decide the threshold."""
    accepted = int(rate * count * (1.0 + 1e-12))
    if accepted >= _FEW:
        return ""
    return f", no {what}" if accepted == 0 else f", of {accepted} {what}{'s' if accepted > 1 else ''}"


def _tell(
    arguments: argparse.Namespace,
    title: str,
    rows: Sequence[tuple[str, str]],
    numbers: dict[str, Any],
    draw: Any,
) -> None:
    """Print the table, write JSON, draw."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    Console(stderr=arguments.json == "-").print(table, highlight=False)
    gallery = arguments.query if arguments.gallery is None else arguments.gallery
    told = {
        "query": str(arguments.query),
        "gallery": str(gallery),
        "bridge": None if arguments.bridge is None else str(arguments.bridge),
        **numbers,
    }
    if arguments.json == "-":
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    elif arguments.json is not None:
        write_whole(Path(arguments.json), json.dumps(told, indent=2) + "\n")
    if arguments.plot is not None:
        figure: Figure = draw(f"{title}: {arguments.query.name} / {gallery.name}")
        figure.savefig(arguments.plot, dpi=150)
