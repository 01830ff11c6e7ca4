"""Caption supervision: masks must explain the words of their own image's caption (paper section 3.4, odise.md 7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distributed import gather


def caption_scores(mask_embedding: Tensor, word_embedding: Tensor, scale: Tensor | float) -> Tensor:
    """How well the masks of image i explain the words of caption j.

    Each word takes the masks by a softmax over their similarities; a pair's score is the mean over the words.

    Args:
        mask_embedding: (I, Q, P), any length.
        word_embedding: (J, W, P), any length.
        scale: factor on the cosine similarity.

    Returns:
        (I, J).
    """
    masks = F.normalize(mask_embedding.float(), dim=-1)
    words = F.normalize(word_embedding.float(), dim=-1)
    similarity = torch.einsum("iqp,jwp->ijqw", masks, words) * scale
    explained = (similarity.softmax(dim=2) * similarity).sum(dim=2)  # (I, J, W)
    return explained.mean(dim=2)


class CaptionGroundingLoss:
    """Symmetric contrast between images and captions over the global batch."""

    def __call__(self, mask_embedding: Tensor, word_embedding: Tensor, valid: Tensor, scale: Tensor | float) -> Tensor:
        """Mean of the image-to-caption and caption-to-image cross-entropies.

        Args:
            mask_embedding: (B, Q, P) of this process.
            word_embedding: (B, W, P) projected embeddings of each caption's words.
            valid: (B,) bool, False where the caption has no noun phrase.
            scale: logit scale, already exponentiated and clamped.

        Returns:
            Scalar, the same on every process.
        """
        masks, words, known = gather(mask_embedding), gather(word_embedding), gather(valid.float())
        scores = caption_scores(masks, words, scale)
        own = torch.arange(len(scores), device=scores.device)
        # With no valid caption at all, the class weights would divide 0 by 0: the published code then leaves them out.
        weight = known if bool(known.any()) else None
        image_to_caption = F.cross_entropy(scores, own, weight=weight)
        caption_to_image = (F.cross_entropy(scores.T, own, reduction="none") * known).mean()
        return 0.5 * (image_to_caption + caption_to_image)
