"""A student that keeps the text head of its teacher (CLIP, arXiv 2103.00020; SigLIP 2, arXiv 2502.14786).

Images are compared with a fixed matrix of text embeddings: of class names, or of any captions that matter.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError
from singer.objectives.base import ObjectiveContext
from singer.objectives.logits import Logits


class ZeroShot(Logits):
    """KL of the softmaxed similarities of images to texts, from those of the teacher's own image embeddings.

    The temperature is CLIP's.
    """

    name = "zero-shot"
    temperature = 0.01
    texts: Tensor

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        assert context.texts is not None
        self.register_buffer("texts", F.normalize(context.texts.float(), dim=-1), persistent=False)

    def check(self) -> None:
        """Raise UserError unless the teacher's last block is cached, and its embeddings are as wide as the texts'."""
        model, texts = self.suffix.model, self.context.texts
        if not self.suffix.is_last(self.block):
            raise UserError("distill.objective zero-shot needs the teacher's last block in the cache")
        if texts is None:
            raise UserError("distill.objective zero-shot needs distill.texts, a .npy of text embeddings (texts, width)")
        if not hasattr(model, "num_features"):
            raise UserError(
                "distill.objective zero-shot needs a teacher of timm: vision models of transformers have no projection "
                "to the space of texts"
            )
        width = int(getattr(model, "num_classes", 0) or model.num_features)
        if texts.shape[1] != width:
            raise UserError(
                f"distill.texts: the embeddings have {texts.shape[1]} channels, and the teacher's images {width}; "
                "use the text model that belongs to the teacher"
            )

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Compute log probabilities (B, texts) for tokens (B, [CLS +] patches, d)."""
        images = F.normalize(self.output(tokens).float(), dim=-1)
        return torch.log_softmax(images @ self.texts.T / self.temperature, dim=-1)
