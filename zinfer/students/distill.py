"""Distil a teacher into a group of students.  In: a teacher's engine, a corpus, settings.  Out: a folder with a group.

Stages: teacher states, a round per student, the polish of all together, calibration.  Each leaves a file behind and
begins where an interrupted run of it stopped; the same settings and texts give the same bits either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinfer.chunks.source import Source
from zinfer.layers.packed import Packed
from zinfer.log import logger
from zinfer.runtime.texts import group_texts, pack_texts
from zinfer.spec.records import ModelSpec
from zinfer.students.boost import boost_loss, energy, hidden_loss, line_search, soft_loss
from zinfer.students.calibrate import calibration
from zinfer.students.corpus import Corpus
from zinfer.students.group import Group
from zinfer.students.measure import Figures, check_labels, figures
from zinfer.students.narrow import cut, width_for
from zinfer.students.settings import DistillSettings, segments
from zinfer.students.student import (
    answer,
    encoder_of,
    fitted_projection,
    head_names,
    pooled,
    shared_names,
    source_names,
)
from zinfer.students.teacher import TeacherStates, read_weights
from zinfer.students.tensors import read_tensors, write_tensors
from zinfer.students.train import Course, num_steps, train

Progress = Callable[[int, int, str], None]
EVAL_ROWS, EVAL_BATCH = 4096, 128
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the polish
HIDDEN_SHARE = 0.5  # of a round's steps, over which the supervision inside the layers fades


@dataclass
class Distillation:
    """One run over a corpus whose teacher states are known.  `work` holds what stages leave behind."""

    teacher: ModelSpec
    source: Source
    corpus: Corpus
    states: TeacherStates
    settings: DistillSettings
    work: Path
    progress: Progress
    save_every: int = 100
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pooled_ND = torch.from_numpy(self.states.pooled.copy())
        self.lengths = [len(one.ids) for one in self.corpus.encoded]
        self.plan = segments(self.teacher.num_layers, self.settings.students, self.settings.layers)
        self.has_segments = encoder_of(self.teacher).num_segments > 1

    def run(self) -> tuple[Group, list[Figures], dict[str, Any]]:
        """The group, its figures per prefix on the dev texts, and notes on what happened.

        Raises UsageError ZI-1192 for labels that have nothing to do with the teacher's classes.
        """
        every = range(len(self.corpus))
        logits_NC, classes_N = self._logits(every), self._labels(every)
        encoder = encoder_of(self.teacher)
        if logits_NC is not None and classes_N is not None and not encoder.is_multi_label:
            check_labels(logits_NC, classes_N, encoder.labels)
        group = self._begin()
        self._boost(group)
        notes: dict[str, Any] = {"rounds": self.rounds, "polish": "not asked for"}
        if self.settings.polish and group.students:
            notes["polish"] = self._polish(group)
        held, dev = self.corpus.held, self.corpus.dev
        prefixes = self._prefixes(group, [*held, *dev])
        self._calibrate(group, prefixes)
        teacher_NC, labels_N = self._logits(dev), self._labels(dev)
        found = figures(group, [rows[dev] for rows in prefixes], self.pooled_ND[dev], teacher_NC, labels_N)
        return group, found, notes

    def _begin(self) -> Group:
        tensors = read_weights(self.source, shared_names(self.teacher))
        head = {name: tensors.pop(name) for name in head_names(self.teacher)}
        origin = self.pooled_ND[self.corpus.train].mean(0)
        width = width_for(self.teacher, self.settings.width, self.settings.mlp_width)
        return Group(self.teacher, tensors, origin, head, layers=self.settings.layers, width=width)

    def _boost(self, group: Group) -> None:
        """A round per student; a round that gains too little is dropped and ends it."""
        sums_ND = group.origin.expand_as(self.pooled_ND).clone()
        for k in range(self.settings.students):
            path = self.work / f"round-{k + 1}.safetensors"
            if not path.exists():
                self._round(group, k, sums_ND, path)
            held, notes = read_tensors(path)
            self.rounds.append(notes)
            if not notes["kept"]:
                logger.warning(
                    "round %d lowers the held-out residual by %.1f %% and is dropped",
                    k + 1,
                    100 * notes["gain"],
                )
                break
            answers_ND = held.pop("answers")
            group.factors.append(held.pop("factor"))
            group.students.append(held)
            sums_ND += group.factors[-1] * answers_ND

    def _round(self, group: Group, k: int, sums_ND: Tensor, path: Path) -> None:
        """Train student k on what the group leaves over, find its weight, and write both down."""
        spec, train_on, settings = group.spec, self.corpus.train, self.settings
        copied = source_names(spec, self.plan[k])
        published = read_weights(self.source, list(copied.values()))
        whole = {name: published[origin] for name, origin in copied.items()}
        weights = cut(spec, self.teacher, whole, k)
        rho_ND = self.pooled_ND - sums_ND
        first = self._map(lambda batch: pooled(spec, group.shared, weights, batch))
        weights |= fitted_projection(first[train_on], rho_ND[train_on])
        maps = {f"map-{layer}": torch.eye(spec.model_dim) for layer in range(settings.layers)}
        leaves = {name: tensor.requires_grad_() for name, tensor in (weights | maps).items()}
        steps = num_steps(len(train_on), settings.batch, settings.epochs)
        course = Course(f"student {k + 1}", steps, settings.batch, settings.lr, settings.seed)
        scale = max(energy(rho_ND[train_on]), 1e-12)

        def loss_of(step: int) -> Tensor:
            texts = course.texts(step, train_on, self.lengths)
            fading = settings.hidden * max(0.0, 1 - step / (HIDDEN_SHARE * steps))
            layers: list[Tensor] = []
            answers = answer(spec, group.shared, leaves, self._pack(texts), layers)
            loss = boost_loss(rho_ND[texts], answers, scale)
            if fading:
                wanted = [self.states.layer_rows(layer, texts) for layer in self.plan[k]]
                loss = loss + fading * hidden_loss(layers, wanted, [leaves[name] for name in maps])
            return loss + self._class_loss(group.logits, sums_ND[texts] + answers, texts)

        self._train(course, leaves, loss_of)
        weights = {name: leaves[name].detach() for name in weights}
        answers_ND = self._map(lambda batch: answer(spec, group.shared, weights, batch))
        held, dev = self.corpus.held, self.corpus.dev
        found = line_search(rho_ND[held], answers_ND[held])
        before = energy(rho_ND[dev])
        after = energy(rho_ND[dev] - found.weight * answers_ND[dev])
        gain = 1 - after / before
        notes = {
            "student": k + 1,
            "layers": self.plan[k],
            "factor": found.weight,
            "held": [found.before, found.after],
            "identity_error": found.error,
            "dev": [before, after],
            "gain": gain,
            "kept": k == 0 or gain >= settings.least_gain,
        }
        results = weights | {"answers": answers_ND, "factor": torch.tensor(found.weight)}
        write_tensors(path, results, notes)

    def _polish(self, group: Group) -> str:
        """Train all students, factors and the head together, a prefix of random length each step.

        How much of what they learnt is kept, a search on texts that nothing was trained on says: of a few points on
        the straight line between before and after (Wortsman et al. 2021, arXiv 2109.01903), the one whose prefixes
        are best; none of it where that is the beginning.
        """
        held, path = self.corpus.held, self.work / "polish.safetensors"
        before = {name: tensor.clone() for name, tensor in _named(group).items()}
        if not path.exists():
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
            self._train_together(_grouped(group, leaves), leaves)
            write_tensors(path, leaves)
        after, losses = read_tensors(path)[0], {}
        for share in SHARES:
            there = {name: torch.lerp(before[name], after[name], share) for name in before}
            group.students, group.factors, group.head = _parts(group, there)
            losses[share] = self._loss_on_held(group, self._prefixes(group, held))
        best = min(losses, key=lambda share: (losses[share], share))
        there = {name: torch.lerp(before[name], after[name], best) for name in before}
        group.students, group.factors, group.head = _parts(group, there)
        said = f"mean loss of the prefixes {losses[best]:.4g}, without it {losses[0.0]:.4g}, with all {losses[1.0]:.4g}"
        if not best:
            logger.warning("the polish made prefixes worse on unseen texts and is dropped: %s", said)
            return f"dropped: {said}"
        return f"kept to {best:.0%}: {said}"

    def _train_together(self, group: Group, leaves: dict[str, Tensor]) -> None:
        settings, train_on, count = self.settings, self.corpus.train, len(group.students)
        steps = num_steps(len(train_on), settings.batch, settings.polish)
        lr = settings.lr * settings.polish_lr
        course = Course("polish", steps, settings.batch, lr, settings.seed)
        scale = max(energy(self.pooled_ND[train_on] - group.origin), 1e-12)

        def loss_of(step: int) -> Tensor:
            texts = course.texts(step, train_on, self.lengths)
            rows = group.represent(self._pack(texts), _prefix(count, course.draw(step, "prefix")))
            loss = boost_loss(self.pooled_ND[texts], rows, scale)
            return loss + self._class_loss(group.logits, rows, texts)

        self._train(course, leaves, loss_of)

    def _train(self, course: Course, leaves: dict[str, Tensor], loss_of: Callable[[int], Tensor]) -> None:
        train(
            course,
            leaves,
            loss_of,
            save_file=self.work / "training.safetensors",
            progress=self.progress,
            save_every=self.save_every,
        )

    def _class_loss(
        self, logits_of: Callable[[Tensor], Tensor], rows_SD: Tensor, texts: Sequence[int]
    ) -> Tensor:
        """Of the classes: the teacher's probabilities, and the labels where there are any."""
        teacher_SC, labels_S = self._logits(texts), self._labels(texts)
        if teacher_SC is None:
            return torch.zeros(())
        settings, is_multi = self.settings, encoder_of(self.teacher).is_multi_label
        logits = logits_of(rows_SD)
        loss = settings.soft * soft_loss(logits, teacher_SC, settings.temperature, is_multi_label=is_multi)
        if labels_S is not None and not is_multi:
            loss = loss + settings.hard * torch.nn.functional.cross_entropy(logits, labels_S)
        return loss

    def _loss_on_held(self, group: Group, prefixes: Sequence[Tensor]) -> float:
        """Mean over prefixes of what the polish minimises, on texts that nothing was trained on."""
        held = self.corpus.held
        scale = energy(self.pooled_ND[held] - group.origin)
        losses = [
            boost_loss(self.pooled_ND[held], rows[held], scale)
            + self._class_loss(group.logits, rows[held], held)
            for rows in prefixes
        ]
        return torch.stack(losses).mean().item()

    def _calibrate(self, group: Group, prefixes: Sequence[Tensor]) -> None:
        held, encoder = self.corpus.held, encoder_of(self.teacher)
        teacher_NC, labels_N = self._logits(held), self._labels(held)
        count, classes = len(group.students), len(encoder.labels)
        group.temperatures, group.biases = torch.ones(count), torch.zeros(count, classes)
        if teacher_NC is None:
            return
        wanted = torch.sigmoid(teacher_NC) if encoder.is_multi_label else torch.softmax(teacher_NC, -1)
        if labels_N is not None and not encoder.is_multi_label:
            wanted = torch.nn.functional.one_hot(labels_N, classes).double()
        for at, rows in enumerate(prefixes):
            group.temperatures[at], group.biases[at] = calibration(
                group.logits(rows[held]), wanted, is_multi_label=encoder.is_multi_label
            )

    def _prefixes(self, group: Group, texts: Sequence[int]) -> list[Tensor]:
        """F_1 .. F_K, fp32 [N, D] each, of these texts; the rows of others hold nothing."""
        spec, sums_ND = group.spec, group.origin.expand_as(self.pooled_ND)
        prefixes = []
        for factor, weights in zip(group.factors, group.students, strict=True):
            answers_ND = self._map(
                lambda batch, own=weights: answer(spec, group.shared, own, batch),  # type: ignore[misc]
                texts,
            )
            sums_ND = sums_ND + factor * answers_ND
            prefixes.append(sums_ND)
        return prefixes

    def _map(self, function: Callable[[Packed], Tensor], texts: Sequence[int] | None = None) -> Tensor:
        """The function of these texts (None: all), fp32 [N, D]; zero for others."""
        chosen = range(len(self.corpus)) if texts is None else texts
        result = torch.zeros_like(self.pooled_ND)
        with torch.no_grad():
            for places in group_texts([self.lengths[text] for text in chosen], EVAL_ROWS, EVAL_BATCH):
                numbers = [chosen[place] for place in places]
                result[numbers] = function(self._pack(numbers))
        return result

    def _pack(self, texts: Sequence[int]) -> Packed:
        batch = pack_texts([self.corpus.encoded[text] for text in texts])
        return batch if self.has_segments else batch.without_segments()

    def _logits(self, texts: Sequence[int]) -> Tensor | None:
        found = self.states.logits
        return None if found is None else torch.from_numpy(found[list(texts)])

    def _labels(self, texts: Sequence[int]) -> Tensor | None:
        labels = self.corpus.labels
        return None if labels is None else torch.tensor([labels[text] for text in texts])


def _prefix(count: int, draw: torch.Generator) -> int:
    """All students with probability 1/2, else any shorter prefix."""
    if count == 1 or torch.rand((), generator=draw) < 0.5:
        return count
    return int(torch.randint(1, count, (), generator=draw))


def _named(group: Group) -> dict[str, Tensor]:
    """What the polish trains, by name."""
    found = {f"factors/{k}": factor for k, factor in enumerate(group.factors)}
    found |= {f"head/{name}": tensor for name, tensor in group.head.items()}
    for k, weights in enumerate(group.students):
        found |= {f"students/{k}/{name}": tensor for name, tensor in weights.items()}
    return found


def _parts(
    group: Group, tensors: dict[str, Tensor]
) -> tuple[list[dict[str, Tensor]], list[Tensor], dict[str, Tensor]]:
    """(students, factors, head) of a group of the same kind over other tensors, named as by `_named`."""
    students = [
        {name: tensors[f"students/{k}/{name}"] for name in own} for k, own in enumerate(group.students)
    ]
    factors = [tensors[f"factors/{k}"] for k in range(len(group.factors))]
    return students, factors, {name: tensors[f"head/{name}"] for name in group.head}


def _grouped(group: Group, tensors: dict[str, Tensor]) -> Group:
    """The group over these tensors."""
    students, factors, head = _parts(group, tensors)
    return replace(group, students=students, factors=factors, head=head)
