"""SSLD's loss (arXiv 2103.05959): it treats student and teacher alike."""

from torch import Tensor

from singer.objectives.logits import Logits


class Js(Logits):
    """Jensen-Shannon divergence of the class probabilities of the teacher's head for student tokens and for its own."""

    name = "js"

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"js": losses (B,)}: half the KL of the mean from each of the two, in nats."""
        ours, theirs = (self.log_probs(x) for x in (student, target))
        mean = (0.5 * (ours.exp() + theirs.exp())).clamp_min(1e-30).log()
        return {"js": 0.5 * (ours.exp() * (ours - mean) + theirs.exp() * (theirs - mean)).sum(-1)}
