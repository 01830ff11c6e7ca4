"""An image on one device in PyTorch from its pixels to its segments: what the runtime's own pipeline does on a GPU.

Between the stages nothing leaves the device. Embeddings of masks go to the host, which names them with the runtime's
code; pixels are merged on the device, as the official code does it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from odise_rt.backends.device_arrays import DeviceArray
from odise_rt.classification import MaskEmbeddings
from odise_rt.errors import ImageError
from odise_rt.image_run import PipelineResult
from odise_rt.kernels.reference import choose_segments
from odise_rt.naming import Lap, Named, NamingRequest, names_of
from odise_rt.postprocessing import MaskResizer, MergedSegment, boxes_and_areas
from odise_rt.preprocessing import resize
from odise_rt.specs import LEVELS, MASK_STRIDE
from odise_rt.windows import window_grid
from training.models.odise import Odise
from training.models.windows import cut_windows, pad_to_multiple, stitch_levels
from training.torch_stages import TorchStage


class TorchPipeline:
    """The image stages of a PyTorch model; see :class:`odise_rt.image_run.Pipeline`."""

    def __init__(self, model: Odise, stages: Mapping[str, TorchStage]) -> None:
        """Put together the stages of a model that lies on its device."""
        self._model = model
        self._stages = stages

    def view(self, image: object) -> DeviceArray:
        """Images come from the host."""
        raise ImageError(f"the image came as {type(image).__name__}: expected one in the host's memory")

    @torch.inference_mode()
    def run(
        self, pixels: np.ndarray | DeviceArray, network_size: tuple[int, int], windows_per_batch: int
    ) -> PipelineResult:
        """Find the masks of one image."""
        assert isinstance(pixels, np.ndarray), "view() gives no other"
        device = self._model.noise.device
        placed = torch.tensor(resize(pixels, network_size), device=device).permute(2, 0, 1)[None]
        found = self._network(placed.float() / 255, windows_per_batch)
        on_host = {name: tensor[0].cpu().numpy() for name, tensor in found.items() if name != "mask_logits"}
        embeddings = MaskEmbeddings(
            on_host["mask_embedding"], on_host["mask_clip_embedding"], on_host.get("object_logits")
        )
        embeddings.check()
        return PipelineResult(TorchMasks(found["mask_logits"][0]), embeddings)

    def segment(
        self,
        pixels: np.ndarray | DeviceArray,
        network_size: tuple[int, int],
        windows_per_batch: int,
        request: NamingRequest,
    ) -> Named:
        """Find and name the masks of one image."""
        found = self.run(pixels, network_size, windows_per_batch)
        _, height, width = found.masks.shape
        resizer = MaskResizer((height, width), network_size, (pixels.shape[0], pixels.shape[1]))
        return found.masks.name(found.embeddings, request, resizer, lambda step: None)

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    def _network(self, image: Tensor, windows_per_batch: int) -> dict[str, Tensor]:
        """Outputs of the last two stages for an image (1, 3, h, w) in [0, 1]."""
        config, stages = self._model.config, self._stages
        canvas = pad_to_multiple(image, config.size_divisor)
        grid = window_grid(canvas.shape[2], canvas.shape[3], config.window)
        batches = cut_windows(canvas, grid).split(windows_per_batch)
        embeddings = [stages["clip_image"].on_device({"windows": batch})["image_embedding"] for batch in batches]
        constants = {"noise": self._model.noise, "null_text_embedding": self._model.null_text_embedding}
        features = [
            stages["unet_tap"].on_device({"windows": batch, "image_embedding": embedding, **constants})
            for batch, embedding in zip(batches, embeddings, strict=True)
        ]
        levels = {name: torch.cat([batch[name] for batch in features]) for name in LEVELS}
        decoded = stages["mask_decoder"].on_device(stitch_levels(levels, grid))
        clip = stages["clip_mask"].on_device({"image": image, "mask_logits": decoded["mask_logits"]})
        return decoded | clip


class TorchMasks:
    """Mask logits of one image on a device; see :class:`odise_rt.naming.Masks`."""

    def __init__(self, logits: Tensor) -> None:
        """Wrap float32 (Q, mh, mw)."""
        self._logits = logits

    @property
    def shape(self) -> tuple[int, ...]:
        """(Q, mh, mw)."""
        return tuple(self._logits.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all logits."""
        return self._logits.nbytes

    def array(self) -> np.ndarray:
        """The logits on the host."""
        array: np.ndarray = self._logits.cpu().numpy()
        return array

    def name(self, embeddings: MaskEmbeddings, request: NamingRequest, resizer: MaskResizer, lap: Lap) -> Named:
        """See :class:`odise_rt.naming.Masks`."""
        names = names_of(embeddings, request)
        lap("classify")
        labels = names.probabilities.argmax(axis=1)
        scores = names.probabilities[np.arange(len(labels)), labels]
        kept = np.flatnonzero((labels != len(request.isthing)) & (scores > request.options.object_mask_threshold))
        owner, areas = merge_pixels(self._logits[kept], scores[kept], resizer.network_size, resizer.original_size)
        ids, chosen = choose_segments(
            labels[kept], scores[kept], areas, request.isthing, request.options.overlap_threshold
        )
        segment_map = np.append(ids, np.int32(0))[owner]  # -1, no mask, is the last one
        boxes, sizes = boxes_and_areas(segment_map, len(chosen))
        segments = [
            MergedSegment(i, label, score, sizes[i - 1], boxes[i - 1], bool(request.isthing[label]), int(kept[query]))
            for i, (query, label, score) in enumerate(chosen, 1)
        ]
        return Named(names, segment_map, segments)


@torch.inference_mode()
def merge_pixels(
    logits: Tensor, scores: np.ndarray, network_size: tuple[int, int], original_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`odise_rt.kernels.reference.panoptic_merge` of masks that all take part, in PyTorch.

    Returns:
        On the host: int16 (h, w), the mask that owns each pixel or -1, and int64 (3, Q) areas.
    """
    if not len(scores):
        return np.full(original_size, -1, np.int16), np.zeros((3, 0), np.int64)
    wide = F.interpolate(logits[None], scale_factor=MASK_STRIDE, mode="bilinear")
    wide = wide[..., : network_size[0], : network_size[1]]
    if original_size != network_size:
        wide = F.interpolate(wide, size=original_size, mode="bilinear")
    inside = wide[0] >= 0
    best = (wide[0].sigmoid() * torch.from_numpy(scores).to(wide)[:, None, None]).argmax(dim=0)
    owner = torch.where(inside.gather(0, best[None])[0], best, -1)
    won, kept = (torch.bincount(of.flatten() + 1, minlength=len(scores) + 1)[1:] for of in (best, owner))
    areas = torch.stack([inside.sum(dim=(1, 2)), won, kept])
    return owner.to(torch.int16).cpu().numpy(), areas.cpu().numpy()
