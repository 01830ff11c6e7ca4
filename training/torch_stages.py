"""The five stages in PyTorch behind the runtime's stage protocol.

:func:`torch_segmenter` makes :class:`odise_rt.segmenter.Segmenter` run a checkpoint as it runs a bundle, so evaluation,
verification and benchmarks compare networks only: everything around them is the same code.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from odise_rt.backends.base import Backend, Device, StageFacts, windows_that_fill
from odise_rt.backends.pool import StagePool
from odise_rt.bundle import CONSTANTS_NAME, TOKENIZER_NAME, Bundle, StageEntry, StageFile
from odise_rt.errors import ConfigError
from odise_rt.image_run import Pipeline
from odise_rt.prompts import PHOTO
from odise_rt.segmenter import Segmenter
from odise_rt.specs import STAGES, ModelFacts, StageSpec, stage_specs
from odise_rt.text_embeddings import TextEmbedder
from training.models.mask_embedding import MAX_LOGIT_SCALE
from training.models.odise import Odise
from training.models.official_structure import (
    official_clip_image,
    official_clip_mask,
    official_decode_masks,
    official_unet_tap,
)

MASK_PROMPTS = {"label": "{}", "caption": PHOTO}
"""Prompt around a word for the mask classifier, by variant (odise.md section 5.1)."""


def model_facts(model: Odise) -> ModelFacts:
    """What the runtime must know of a model."""
    config = model.config
    return ModelFacts(
        variant=config.variant,
        window=config.window,
        size_divisor=config.size_divisor,
        clip_image_size=config.clip.image_size,
        clip_embed_dim=config.clip.embed_dim,
        context_length=config.clip.context_length,
        start_token=config.clip.start_token,
        end_token=config.clip.end_token,
        pad_token=0,
        null_text_length=config.sd_text.context_length,
        null_text_dim=config.sd_text.width,
        queries=config.head.queries,
        pyramid_channels=config.head.pyramid_channels,
        hidden_dim=config.head.hidden_dim,
        classification_dim=config.head.classification_dim,
        test_short_edge=config.test_short_edge,
        test_long_edge=config.test_long_edge,
        mask_logit_scale=float(model.mask_generator.mask_embedding.logit_scale.detach()),
        clip_logit_scale=float(model.clip.logit_scale.detach().exp().clamp(max=MAX_LOGIT_SCALE)),
        clip_weight_seen=config.clip_weight_seen,
        clip_weight_unseen=config.clip_weight_unseen,
        mask_prompt=MASK_PROMPTS[config.variant],
        clip_prompt=PHOTO,
    )


@torch.no_grad()
def model_constants(model: Odise) -> dict[str, np.ndarray]:
    """The bundle's constants: ``noise``, ``null_text_embedding`` and, under label supervision, the projected
    ``no_object_embedding``; all float32.
    """
    constants = {"noise": model.noise, "null_text_embedding": model.null_text_embedding}
    no_object = model.mask_classifier.no_object_embedding
    if no_object is not None:
        constants["no_object_embedding"] = model.mask_classifier.project_text(no_object)[0]
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in constants.items()}


class TorchStage:
    """One stage of a PyTorch model, numpy in and numpy out, in the structure that ``model.structure`` names."""

    def __init__(self, model: Odise, spec: StageSpec) -> None:
        self.model = model
        self.spec = spec

    @property
    def facts(self) -> StageFacts:
        """What runs the stage."""
        return StageFacts(
            stage=self.spec.name,
            engine=f"torch {torch.__version__}",
            provider=f"eager, {self.model.structure} structure",
            device=_device(self.model),
            file="",
            load_seconds=0.0,
        )

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the stage; arrays come and go by the names of the spec."""
        self.spec.check(inputs)
        parameter = next(self.model.parameters())
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        outputs = self.on_device({name: tensor.to(parameter.device) for name, tensor in tensors.items()})
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    @torch.inference_mode()
    def on_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the stage on tensors on the model's device; the outputs are float32."""
        named = zip(self.spec.outputs, self._call(inputs), strict=True)
        return {tensor_spec.name: tensor.float() for tensor_spec, tensor in named}

    def _call(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        model, name = self.model, self.spec.name
        official = model.structure == "official"
        if name == "mask_decoder":
            prediction = official_decode_masks(model, tensors) if official else model.decode_masks(**tensors)
            outputs = [prediction.mask_logits, prediction.mask_embedding]
            return tuple(outputs if prediction.object_logits is None else [*outputs, prediction.object_logits])
        if official and name == "clip_image":
            return (official_clip_image(model, **tensors),)
        if official and name == "unet_tap":
            return official_unet_tap(model, **tensors)
        if official and name == "clip_mask":
            return (official_clip_mask(model, **tensors),)
        out = getattr(model, name)(**tensors)
        return out if isinstance(out, tuple) else (out,)

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""


class TorchBackend:
    """Hands out the stages of a PyTorch model that is already in memory."""

    def __init__(self, model: Odise) -> None:
        self.model = model
        self.specs = stage_specs(model_facts(model))

    @property
    def device(self) -> Device:
        """The device that the model lies on."""
        return _device(self.model)

    @property
    def description(self) -> str:
        """Engine, structure and threads in one line."""
        return f"torch {torch.__version__} eager, {self.model.structure} structure, {torch.get_num_threads()} threads"

    def keeps_loaded(self, bundle: Bundle, stage: str) -> bool:
        """Always: a stage here is a method of the model."""
        return True

    def windows_per_batch(self, side: int) -> int:
        """A 512 x 512 window fills a CPU; smaller ones run together, all of them on a GPU."""
        return windows_that_fill(self.device, side, on_gpu=64)

    def load(self, bundle: Bundle, stage: str) -> TorchStage:
        """The stage of that name; nothing is read from the bundle."""
        return TorchStage(self.model, self.specs[stage])


@contextlib.contextmanager
def torch_segmenter(
    model: Odise,
    tokenizer_json: str,
    training_vocabulary: Iterable[str],
    backend: Backend | None = None,
    pipeline: Pipeline | None = None,
) -> Iterator[Segmenter]:
    """A :class:`Segmenter` that runs a PyTorch model, for the time of a ``with`` block.

    Args:
        model: in eval mode, on its device; ``model.structure`` chooses what is computed.
        tokenizer_json: of CLIP's text tower, as in a checkpoint.
        training_vocabulary: names and synonyms seen in training.
        backend: runs the stages, e.g. to record them; ``None``: a :class:`TorchBackend` of the model.
        pipeline: takes each image whole, in place of the backend's image stages.

    Raises:
        ConfigError: the model must be told each picture's caption, and no backend does so.
    """
    if model.config.conditioning == "caption" and backend is None:
        raise ConfigError(
            f"{model.config.name!r} is conditioned on the captions of pictures, which segmenting does not know: it is "
            "measured by `python -m training.ablation --only conditioning/caption`"
        )
    facts = model_facts(model)
    with tempfile.TemporaryDirectory(prefix="odise-torch-") as folder:
        root = Path(folder)
        np.savez(root / CONSTANTS_NAME, **model_constants(model))
        (root / TOKENIZER_NAME).write_text(tokenizer_json, encoding="utf-8")
        no_file = StageFile(root, "", {})
        bundle = Bundle(
            root=root,
            name=model.config.name,
            precision="fp32",
            facts=facts,
            stages={name: StageEntry(spec, no_file, {}, None, None) for name, spec in stage_specs(facts).items()},
            training_vocabulary=frozenset(training_vocabulary),
            manifest={"files": {TOKENIZER_NAME: hashlib.sha256(tokenizer_json.encode()).hexdigest()}},
            digest="",
            verified=True,
        )
        backend = TorchBackend(model) if backend is None else backend
        stages = StagePool(backend, bundle, keep=frozenset(STAGES))
        # No disk cache: it is keyed by a graph's hash, and these weights have none.
        with Segmenter(bundle, backend, stages, TextEmbedder(bundle, stages, cache=None), pipeline) as segmenter:
            yield segmenter


def _device(model: Odise) -> Device:
    return "cuda" if next(model.parameters()).is_cuda else "cpu"
