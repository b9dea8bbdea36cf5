"""What can be known here of a run on Kubernetes before it is submitted: everything but what lies in the cluster and its claim."""

from __future__ import annotations

from collections.abc import Iterator

from launch.kubernetes import KubernetesOptions, job_name, overlay_has_gpus, places
from launch.plan import counted
from launch.preflight import gpu_of_kind, memory_note
from launch.prepare import check_method
from lce_dist.config import Config
from lce_dist.errors import ConfigError
from lce_dist.models.catalog import build_net
from lce_dist.training.plan import plan_stage


def look(options: KubernetesOptions, config: Config) -> Iterator[str]:
    """One line each thing. Errors: ConfigError for what a config or a command says wrong, SetupError for a plan that does not fit."""
    check_method(config)
    for section in (config.old, config.new):
        if section.net is not None:
            build_net(section.net, section.embedding_dim, config.data.image_size, seed=0)
    yield "config: it can be read, its method and networks exist"
    sizes = _sizes(config)
    if sizes is None:
        yield "data: in the claim, not seen from here"
    else:
        num_classes, num_samples = sizes
        num_ranks = options.nodes * options.workers_per_node
        plan_stage(config, num_samples, num_classes, config.new.epochs, num_ranks)
        yield f"data: {sizes[0]:,} identities and {sizes[1]:,} images to train on; the batch divides"
    uses_gpus = overlay_has_gpus(options.overlay)
    gpu = None if options.gpu is None else gpu_of_kind(options.gpu)
    yield memory_note(config, sizes, uses_gpus, gpu, options.nodes, options.workers_per_node)
    yield f"manifests: they build; the RayJob would be {options.namespace}/{job_name(options)}"
    inside = [key for key, value in places(config) if "://" not in value]
    yield (
        "not looked at from here: the cluster, its storage and MLflow"
        + (f", and what {', '.join(inside)} name there" if inside else "")
        + "; the run looks at them before its first step"
    )
    yield "checked: nothing was submitted; the same command without --check submits"


def _sizes(config: Config) -> tuple[int, int] | None:
    """Identities and images that the new model trains on; None where they lie in the claim."""
    data = config.data
    if any(place is not None and "://" not in place for place in (data.shards, data.images)):
        return None
    try:
        return counted(config)
    except ConfigError:
        if data.synthetic is not None:
            raise
        return None
