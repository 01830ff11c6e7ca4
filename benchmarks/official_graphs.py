"""The unpruned structure as ONNX graphs, exported plainly: the baseline "ONNX Runtime on the networks as they are".

Any exporter drops what no output needs, which would prune the graphs behind our back. So what the official code
computes and throws away is kept alive as an output, as it is when whole networks are exported: the UNet's and the VAE
decoder's own results, and the masks and mask embeddings of every prediction head. (The second pooling of each head is
identical and merged by the exporter; the text encoder's pass over "" depends on no input and is folded.) Shapes are
fixed to one window and one image size, no optimisation of ours is applied.

    python -m benchmarks.official_graphs --checkpoint training/pretrained/odise-tiny --size 256 --out out/official
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.variants import load_model
from odise_rt.command_line import MAX_SEED, CommandParser, command, whole_number
from odise_rt.partial_folder import partial_folder
from odise_rt.specs import MASK_STRIDE, StageSpec, stage_specs
from odise_rt.windows import window_grid
from training.models.odise import Odise
from training.models.official_structure import official_clip_image, official_clip_mask, official_unet_tap
from training.torch_stages import model_facts

OPSET = 20


class _Official(nn.Module):
    """A stage of the official structure that also returns what the official code throws away."""

    def __init__(self, model: Odise) -> None:
        super().__init__()
        self.model = model


class ClipImage(_Official):
    """All tokens through the last layer."""

    def forward(self, windows: Tensor) -> tuple[Tensor, ...]:
        """See :func:`training.models.official_structure.official_clip_image`."""
        return (official_clip_image(self.model, windows),)


class UnetTap(_Official):
    """The whole UNet and the whole VAE decoder."""

    def forward(
        self, windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor
    ) -> tuple[Tensor, ...]:
        """See :func:`training.models.official_structure.official_unet_tap`."""
        thrown_away: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: object) -> None:
            thrown_away.append(output if isinstance(output, Tensor) else output[0])  # type: ignore[index]

        hooks = [network.register_forward_hook(keep) for network in (self.model.unet, self.model.vae.decoder)]
        try:
            levels = official_unet_tap(self.model, windows, image_embedding, noise, null_text_embedding)
        finally:
            for hook in hooks:
                hook.remove()
        return (*levels, *thrown_away)


class MaskDecoder(_Official):
    """Masks and embeddings of every prediction head; the last head's come first, as the spec has them."""

    def forward(self, s2: Tensor, s3: Tensor, s4: Tensor, s5: Tensor) -> tuple[Tensor, ...]:
        """See :func:`training.models.official_structure.official_decode_masks`."""
        generator = self.model.mask_generator
        mask_features, refined = generator.pixel_decoder({"s2": s2, "s3": s3, "s4": s4, "s5": s5})
        states = generator.mask_decoder.all_states(mask_features, refined)
        *others, last = [generator.head(normed, logits, mask_features) for normed, logits in states]
        outputs = [last.mask_logits, last.mask_embedding]
        if last.object_logits is not None:
            outputs.append(last.object_logits)
        for prediction in others:
            outputs += [prediction.mask_logits, prediction.mask_embedding]
        return tuple(outputs)


class ClipMask(_Official):
    """CLIP on the long sequence of masks, class token and patches."""

    def forward(self, image: Tensor, mask_logits: Tensor) -> tuple[Tensor, ...]:
        """See :func:`training.models.official_structure.official_clip_mask`."""
        return (official_clip_mask(self.model, image, mask_logits),)


STAGES: dict[str, type[_Official]] = {
    "clip_image": ClipImage,
    "unet_tap": UnetTap,
    "mask_decoder": MaskDecoder,
    "clip_mask": ClipMask,
}


def export_official(model: Odise, height: int, width: int, out: Path) -> None:
    """Write the four graphs of an image for one size of image; the folder appears only when all are there.

    Args:
        model: in eval mode.
        height: of the image inside the network in pixels.
        width: likewise.
        out: a folder that does not exist yet.
    """
    facts = model_facts(model)
    canvas_h, canvas_w = (-(-side // facts.size_divisor) * facts.size_divisor for side in (height, width))
    side = window_grid(canvas_h, canvas_w, facts.window).side
    dims = {"N": 1, "s": side, "Q": facts.queries, "H": canvas_h, "W": canvas_w, "h": height, "w": width}
    dims |= {"mh": canvas_h // MASK_STRIDE, "mw": canvas_w // MASK_STRIDE}
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(out) as partial:
        for name, stage in STAGES.items():
            print(f"official structure: {name} ...", flush=True)
            _export(stage(model).eval(), stage_specs(facts)[name], dims, partial / f"{name}.onnx")
        partial.rename(out)


def _export(stage: nn.Module, spec: StageSpec, dims: dict[str, int], path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.rand(tensor.resolve(dims), generator=generator) for tensor in spec.inputs)
    with torch.no_grad():
        count = len(stage(*inputs))
    names = [tensor.name for tensor in spec.outputs]
    names += [f"thrown_away_{index}" for index in range(count - len(names))]
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            stage,
            inputs,
            str(path),
            dynamo=True,
            opset_version=OPSET,
            external_data=True,
            # The exporter's optimiser takes the 1e-8 of a mean's denominator for zero, and empty masks become NaN.
            optimize=False,
            verbose=False,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=names,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        warnings.simplefilter("ignore")
        yield


@command("nothing was written")
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandParser(prog="python -m benchmarks.official_graphs", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="A checkpoint directory of this project.")
    parser.add_argument("--config", help="A preset with random weights instead.")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="Seed of the random weights.")
    parser.add_argument(
        "--size",
        type=whole_number(64, 4096),
        nargs="+",
        required=True,
        help="Image side, or height and width, in pixels.",
    )
    parser.add_argument("--out", type=Path, required=True, help="A new folder for the graphs.")
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.config is None):
        parser.error("expected either --checkpoint or --config")
    if len(options.size) > 2:
        parser.error("--size takes one or two sides")
    if options.out.exists():
        parser.error(f"--out {options.out} is there already: choose another folder")
    source = {"config": options.config, "seed": options.seed}
    if options.checkpoint is not None:
        source = {"checkpoint": str(options.checkpoint)}
    export_official(load_model(source).model, options.size[0], options.size[-1], options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
