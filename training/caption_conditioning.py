"""Tells the UNet a picture's own caption: the ablation that the implicit captioner is compared with.

The diffusion model's text encoder embeds the caption, and the result takes the place of its embedding of "". All
windows of a picture get the same caption. The runtime knows no captions, so such a model cannot be exported.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tokenizers
import torch
from torch import Tensor

from odise_rt.bundle import Bundle
from odise_rt.errors import CheckpointError, DatasetError
from odise_rt.tokenizer import clean_text
from training.batches import BatchSource
from training.data.coco_panoptic import PanopticExample
from training.data.picture_files import ImageId
from training.models.odise import Odise
from training.torch_stages import TorchBackend, TorchStage
from training.training_step import StepInput

logger = logging.getLogger(__name__)

NO_TEXT_ENCODER = (
    "the frozen checkpoint was saved without the diffusion model's text encoder, which conditioning on captions needs: "
    "convert Stable Diffusion's own files with `python -m training.checkpoints convert` and name that checkpoint as "
    "--frozen (for odise-tiny: `python -m training.pretrain.text_encoder` trains one for the checkpoint that ships)"
)


class CaptionContexts:
    """Embeds captions by image id and remembers the latest of them."""

    def __init__(
        self, model: Odise, tokenizer_json: str, captions: Mapping[ImageId, str], remembered: int = 2048
    ) -> None:
        """Wrap a model.

        Args:
            model: supplies the diffusion text encoder, on any device.
            tokenizer_json: text of CLIP's tokenizer file; Stable Diffusion 1.x shares it.
            captions: of each picture by image id.
            remembered: how many embeddings are kept.

        Raises:
            CheckpointError: the model has no diffusion text encoder.
        """
        if model.sd_text is None:
            raise CheckpointError(NO_TEXT_ENCODER)
        self.text = model.sd_text
        self.config = model.config.sd_text
        self.captions = captions
        self.remembered = remembered
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._known: OrderedDict[ImageId, Tensor] = OrderedDict()

    def tokens(self, caption: str) -> Tensor:
        """Ids (1, T): start token, pieces (cut where they are too many), end tokens."""
        config = self.config
        pieces = self.tokenizer.encode(clean_text(caption).lower(), add_special_tokens=False).ids
        ids = [config.start_token, *pieces[: config.context_length - 2]]
        return torch.tensor([ids + [config.end_token] * (config.context_length - len(ids))])

    @torch.no_grad()
    def __call__(self, image_ids: Sequence[ImageId]) -> Tensor:
        """Contexts (B, T, context_dim) of pictures.

        Raises:
            DatasetError: a picture has no caption.
        """
        device = next(self.text.parameters()).device
        for image_id in image_ids:
            if image_id not in self.captions:
                raise DatasetError(f"image id {image_id} has no caption: conditioning on captions needs one a picture")
            if image_id not in self._known:
                ids = self.tokens(self.captions[image_id]).to(device)
                self._known[image_id] = self.text(input_ids=ids).last_hidden_state.float()
            self._known.move_to_end(image_id)
        found = torch.cat([self._known[image_id] for image_id in image_ids])
        while len(self._known) > self.remembered:
            self._known.popitem(last=False)
        return found


class CaptionedBatches:
    """Batches of another source with the contexts of their pictures' captions."""

    def __init__(self, source: BatchSource, contexts: CaptionContexts) -> None:
        self.source = source
        self.contexts = contexts

    def batches(self, draws: Sequence[Sequence[int]]) -> Iterator[StepInput]:
        """One input for each list of draw numbers."""
        for step in self.source.batches(draws):
            yield dataclasses.replace(step, caption_context=self.contexts(step.targets.image_ids))


class CaptionedBackend(TorchBackend):
    """A PyTorch model whose UNet is told a caption: call :meth:`tell` before each picture."""

    def __init__(self, model: Odise, contexts: CaptionContexts) -> None:
        super().__init__(model)
        self.contexts = contexts
        self.context: np.ndarray | None = None

    def tell(self, example: PanopticExample) -> None:
        """Use this picture's caption from now on."""
        self.context = self.contexts([example.image_id]).cpu().numpy()

    def load(self, bundle: Bundle, stage: str) -> TorchStage:
        """The stage of that name."""
        return _CaptionedStage(self, stage) if stage == "unet_tap" else super().load(bundle, stage)


class _CaptionedStage(TorchStage):
    def __init__(self, backend: CaptionedBackend, stage: str) -> None:
        super().__init__(backend.model, backend.specs[stage])
        self.backend = backend

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the stage with the caption's context in place of that of ""."""
        assert self.backend.context is not None, "tell() comes before segment()"
        return super().run({**inputs, "null_text_embedding": self.backend.context})
