"""Puts a run together: model with frozen weights and fresh heads, classes, words, and the batches of each phase."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from odise_rt.errors import CheckpointError, DatasetError
from odise_rt.vocabulary import Vocabulary
from training.batches import BatchSource, CachedBatches, LiveBatches
from training.caption_conditioning import CaptionContexts, CaptionedBatches
from training.checkpoints.own_format import load_checkpoint, read_description
from training.config import OdiseConfig
from training.data.coco_panoptic import Category, CocoPanoptic, coco_root
from training.data.views import TrainingViews
from training.distributed import rank, world_size
from training.evaluation import data_vocabulary
from training.experiment import Experiment, Phase
from training.feature_cache import open_or_build
from training.losses import Criterion
from training.models import frozen as frozen_networks
from training.models.odise import Odise
from training.models.variants import build_odise
from training.training_step import ClassText, TrainingStep
from training.words import WordEmbedder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """What a trainer needs, and what the finished checkpoint stores beside the weights."""

    step: TrainingStep
    sources: tuple[Callable[[], BatchSource], ...]
    """One for each phase; features are computed when a phase's source is made."""
    classes: tuple[tuple[str, ...], ...]
    """The words of each class to learn."""
    tokenizer_json: str
    annotation_files: Mapping[str, Path]
    """What the run reads of the data set besides pictures, by what it is."""

    @property
    def training_vocabulary(self) -> tuple[str, ...]:
        """The words of all classes, class by class."""
        return tuple(word for words in self.classes for word in words)


def starting_model(experiment: Experiment, frozen: Path, heads: Path | None = None) -> tuple[Odise, str]:
    """A model with the frozen networks of a checkpoint, and heads newly initialised or those of a checkpoint.

    At no time are two sets of frozen networks in memory.

    Returns:
        The model, and the text of its tokenizer file.

    Raises:
        CheckpointError: what is taken from the checkpoint has another shape than the experiment's.
    """
    wanted = experiment.model
    _check_parts(experiment, frozen, _config_of(frozen), ("vae", "unet", "sd_text", "clip"))
    values = None
    if heads is not None:
        _check_parts(experiment, heads, _config_of(heads), ("head", "variant", "features", "conditioning"))
        if heads != frozen:
            values = load_checkpoint(heads).model.trained_parameters()
    torch.manual_seed(experiment.seed)
    # Whole, although only heads are kept of it: what they draw comes after what the other networks have drawn.
    model = build_odise(wanted)
    _let_go(model)
    with torch.random.fork_rng([]):
        loaded = load_checkpoint(frozen)
    if heads == frozen:
        values = loaded.model.trained_parameters()
    if experiment.random_unet_seed is not None:
        with torch.random.fork_rng([]):
            torch.manual_seed(experiment.random_unet_seed)
            loaded.model.unet = frozen_networks.build_unet(wanted.unet, wanted.latent_side)
    for part in ("vae", "unet", "clip"):
        getattr(model, part).load_state_dict(getattr(loaded.model, part).state_dict(), assign=True)
    if loaded.model.sd_text is not None and model.sd_text is not None:
        model.sd_text.load_state_dict(loaded.model.sd_text.state_dict(), assign=True)
    else:
        model.drop_sd_text()
    model.null_text_embedding.copy_(loaded.model.null_text_embedding)
    if values is not None:
        with torch.no_grad():
            for name, parameter in model.trained_parameters().items():
                if values[name].shape != parameter.shape:
                    raise CheckpointError(
                        f"{name} has shape {tuple(values[name].shape)} in {heads}, experiment {experiment.name!r} "
                        f"needs {tuple(parameter.shape)}: its frozen networks have other widths"
                    )
                parameter.copy_(values[name])
        return model, loaded.tokenizer_json
    embedder = WordEmbedder(model, loaded.tokenizer_json)
    if model.mask_classifier.no_object_embedding is not None:
        with torch.no_grad():
            model.mask_classifier.no_object_embedding.copy_(embedder.embed([""]))
    return model, loaded.tokenizer_json


def _config_of(path: Path) -> OdiseConfig:
    return OdiseConfig.from_dict(read_description(path)["config"])


def _let_go(model: Odise) -> None:
    """Free the memory of the frozen networks' parameters, which keep their shapes."""
    for network in (model.vae, model.unet, model.sd_text, model.clip):
        for module in () if network is None else network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _check_parts(experiment: Experiment, path: Path, config: OdiseConfig, parts: Sequence[str]) -> None:
    for part in parts:
        if getattr(config, part) != getattr(experiment.model, part):
            raise CheckpointError(
                f"{path} has {part} {getattr(config, part)}, experiment {experiment.name!r} needs "
                f"{getattr(experiment.model, part)}: name the checkpoint that belongs to it"
            )


def training_categories(data: CocoPanoptic) -> tuple[Category, ...]:
    """Categories with at least one segment to learn from: a data set may list others that are to stay unseen, and a
    crowd becomes background in every view.
    """
    used = set().union(*(data.categories_of(index) for index in range(len(data))))
    found = tuple(category for category in data.categories if category.id in used)
    if not found:
        raise DatasetError("the training set has no segment that is no crowd: check the annotation file")
    return found


def prepare_run(
    experiment: Experiment,
    data_root: Path,
    *,
    split: str,
    frozen: Path,
    cache: Path,
    device: str,
    workers: int,
    heads: Path | None = None,
    classes: Vocabulary | None = None,
) -> RunParts:
    """Read the data set and the frozen weights, and build everything.

    Args:
        experiment: what to train.
        data_root: folder of the data set.
        split: its training part.
        frozen: checkpoint that supplies the frozen networks and the tokenizer.
        cache: folder for feature caches.
        device: where to train.
        workers: processes that augment pictures.
        heads: checkpoint whose trained heads are the start; None: fresh ones.
        classes: other words for the data set's classes, in its order.
    """
    captioned = "caption" in (experiment.model.variant, experiment.model.conditioning)
    # Those that are there are read in any case: cached views keep words, and a run with other supervision shares them.
    data = CocoPanoptic.from_root(data_root, split, with_captions=captioned or None)
    categories = training_categories(data)
    class_of = {category.id: index for index, category in enumerate(categories)}
    vocabulary = data_vocabulary(data.categories, classes)
    words_of = tuple(vocabulary[data.index_of[category.id]].words for category in categories)
    model, tokenizer_json = starting_model(experiment, frozen, heads)
    model.to(device)
    embedder = WordEmbedder(model, tokenizer_json)
    class_text = None
    if experiment.model.variant == "label":
        class_text = ClassText(embedder([word for words in words_of for word in words]), tuple(map(len, words_of)))
    step = TrainingStep(
        model, Criterion(experiment.criterion), class_text, experiment.precision, experiment.gradient_checkpointing
    )
    caption_words = embedder if class_text is None else None
    contexts = None
    if experiment.model.conditioning == "caption":
        contexts = CaptionContexts(model, tokenizer_json, data.first_captions())
    facts: dict[str, Any] = {
        "annotations": annotation_fingerprint(data_root, split),
        "window": experiment.model.window,
    }
    if experiment.cropped_out_targets:  # named only where it is on: caches that are older than it stay valid
        facts["cropped_out_targets"] = True

    def source(index: int, phase: Phase) -> BatchSource:
        seed = experiment.seed + 1000 * index
        if not phase.cached_views:
            views = TrainingViews(data, class_of, phase.jitter, seed, experiment.cropped_out_targets)
            return LiveBatches(views, phase.jitter.crop, caption_words, workers)
        view_seed = seed if phase.cached_view_seed is None else phase.cached_view_seed
        views = TrainingViews(data, class_of, phase.jitter, view_seed, experiment.cropped_out_targets)
        jitter = dataclasses.asdict(phase.jitter)
        if not phase.jitter.diagonal_crops:  # as above
            del jitter["diagonal_crops"]
        key = {**facts, "jitter": jitter, "views": phase.cached_views, "seed": view_seed}
        build = functools.partial(open_or_build, cache, key, model, views, phase.cached_views, progress=_progress)
        if rank() == 0:
            with threads_of_all_processes(device):
                found = build()
        if world_size() > 1:
            dist.barrier()
        if rank() != 0:
            found = build()
        return CachedBatches(found, phase.jitter.crop, seed, caption_words)

    def conditioned(index: int, phase: Phase) -> BatchSource:
        plain = source(index, phase)
        return plain if contexts is None else CaptionedBatches(plain, contexts)

    sources = tuple(functools.partial(conditioned, index, phase) for index, phase in enumerate(experiment.phases))
    files = {"annotation file": data.annotations_path}
    if captioned and data.captions_path is not None:
        files["caption file"] = data.captions_path
    return RunParts(step, sources, words_of, tokenizer_json, files)


@contextlib.contextmanager
def threads_of_all_processes(device: str) -> Iterator[None]:
    """While one process computes the feature cache, the others of this machine wait: it may use their CPU threads."""
    own = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(own * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def annotation_fingerprint(root: Path, split: str) -> str:
    """Hash of the split's annotation and caption files."""
    digest = hashlib.sha256()
    for path in sorted((coco_root(root) / "annotations").glob(f"*_{split}.json")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _progress(starts: Iterator[int], total: int) -> Iterator[int]:
    return iter(tqdm(starts, total=total, desc="frozen features", mininterval=5))
