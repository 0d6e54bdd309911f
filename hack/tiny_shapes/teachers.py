"""Heads that say during training what features should hold; they are dropped in the end."""

import torch
import torch.nn.functional as F  # noqa: N812

from tiny_shapes import drawing, trainee

_NOTHING_WEIGHT = 0.05
"""Weight of cells without a mark, which are most."""


class PlaceHead(torch.nn.Module):
    """Tells from an image token where it lies."""

    def __init__(self, hidden: int, *, places: int) -> None:
        super().__init__()
        self.place = torch.nn.Linear(hidden, places)

    def forward(self, known: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the loss of what is known [..., hidden] for places [..., places]."""
        if not len(places):
            return known.sum() * 0
        return F.binary_cross_entropy_with_logits(self.place(known.float()), places)


def looking_loss(
    model: trainee.Trainee, known: torch.Tensor, labels: torch.Tensor, subjects: torch.Tensor
) -> torch.Tensor:
    """Return how little the tokens of answers look at what they are about.

    `known` [B, T, hidden] goes into the layer that looks, `labels` [B, T] are
    negative outside of answers, `subjects` [B, T] is true for image tokens
    that show what an answer is about.
    """
    texts, positions = torch.nonzero((labels >= 0) & subjects.any(1, keepdim=True), as_tuple=True)
    if not len(texts):
        return known.sum() * 0
    looks = model.look(known, texts, positions)
    mass = looks.masked_fill(~subjects[texts].unsqueeze(1), -torch.inf).logsumexp(2)
    return -mass.mean()


class CellHead(torch.nn.Module):
    """Tells shape, colour and half of the tile from an image token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.place = PlaceHead(hidden, places=2)
        self.shape = torch.nn.Linear(hidden, len(drawing.SHAPES) + 1)
        self.colour = torch.nn.Linear(hidden, len(drawing.COLOURS) + 1)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of features [N, 256, hidden] for labels [N, 256, 2]."""
        weight = torch.ones(len(drawing.SHAPES) + 1, device=features.device)
        weight[0] = _NOTHING_WEIGHT
        losses = [
            F.cross_entropy(head(features).flatten(0, -2), own.flatten(), weight)
            for head, own in zip((self.shape, self.colour), labels.unbind(-1), strict=True)
        ]
        halves = drawing.halves_of_one_tile(features.device).expand(len(features), -1, -1)
        place: torch.Tensor = self.place(features, halves)
        return losses[0] + losses[1] + place

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Return how many of the marked cells are told right."""
        marked = labels[..., 0] > 0
        right = self.shape(features).argmax(-1) == labels[..., 0]
        return float(right[marked].float().mean())
