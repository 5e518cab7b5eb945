"""TinyViT's loss (arXiv 2207.10666, section 3.2): only the teacher's largest class probabilities are kept."""

from torch import Tensor

from singer.objectives.logits import Logits


class TopLogits(Logits):
    """Cross-entropy to the teacher's `kept` largest probabilities; the rest of its mass is spread over all others."""

    name = "top-logits"
    kept = 100

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"ce": losses (B,)}, in nats."""
        ours, theirs = (self.log_probs(x) for x in (student, target))
        classes = theirs.shape[-1]
        kept = min(self.kept, classes)
        largest, places = theirs.exp().topk(kept, dim=-1)
        rest = (1 - largest.sum(-1, keepdim=True)).clamp_min(0) / max(1, classes - kept)
        wanted = rest.expand(-1, classes).scatter(-1, places, largest)
        return {"ce": -(wanted * ours).sum(-1)}
