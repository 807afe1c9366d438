"""Distil a teacher into a group of students.  In: a teacher's engine, a corpus, settings.  Out: a folder with a group.

Stages: teacher states, a round per student, the polish of all together, calibration.  Each leaves a file behind and
begins where an interrupted run of it stopped; the same settings and texts give the same bits either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from zinfer.students.measure import Figures, figures
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
        """The group, its figures per prefix on the dev texts, and notes on what happened."""
        group = self._begin()
        answers = self._boost(group)
        notes: dict[str, Any] = {"rounds": self.rounds, "polish": "not asked for"}
        if self.settings.polish and group.students:
            notes["polish"] = self._polish(group, answers)
        prefixes = self._prefixes(group)
        self._calibrate(group, prefixes)
        dev = self.corpus.dev
        teacher_NC, labels_N = self._logits(dev), self._labels(dev)
        found = figures(group, [rows[dev] for rows in prefixes], self.pooled_ND[dev], teacher_NC, labels_N)
        return group, found, notes

    def _begin(self) -> Group:
        tensors = read_weights(self.source, shared_names(self.teacher))
        head = {name: tensors.pop(name) for name in head_names(self.teacher)}
        origin = self.pooled_ND[self.corpus.train].mean(0)
        return Group(self.teacher, tensors, origin, head, layers=self.settings.layers)

    def _boost(self, group: Group) -> list[Tensor]:
        """A round per student; a round that gains too little is dropped and ends it."""
        sums_ND = group.origin.expand_as(self.pooled_ND).clone()
        answers = []
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
            answers.append(held.pop("answers"))
            group.factors.append(held.pop("factor"))
            group.students.append(held)
            sums_ND += group.factors[-1] * answers[-1]
        return answers

    def _round(self, group: Group, k: int, sums_ND: Tensor, path: Path) -> None:
        """Train student k on what the group leaves over, find its weight, and write both down."""
        spec, train_on, settings = group.spec, self.corpus.train, self.settings
        copied = source_names(spec, self.plan[k])
        published = read_weights(self.source, list(copied.values()))
        weights = {name: published[origin].clone() for name, origin in copied.items()}
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

        train(
            course,
            leaves,
            loss_of,
            save_file=self.work / "training.safetensors",
            progress=self.progress,
            save_every=self.save_every,
        )
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
            "dev": [before, after],
            "gain": gain,
            "kept": k == 0 or gain >= settings.least_gain,
        }
        results = weights | {"answers": answers_ND, "factor": torch.tensor(found.weight)}
        write_tensors(path, results, notes)

    def _polish(self, group: Group, answers: Sequence[Tensor]) -> str:
        """Train all students, factors and the head together, a prefix of random length each step."""
        settings, train_on, count = self.settings, self.corpus.train, len(group.students)
        path = self.work / "polish.safetensors"
        before = self._loss_on_held(group, self._summed(group, answers))
        mine = {f"factors/{k}": factor.clone() for k, factor in enumerate(group.factors)}
        mine |= {f"head/{name}": tensor.clone() for name, tensor in group.head.items()}
        for k, weights in enumerate(group.students):
            mine |= {f"students/{k}/{name}": tensor.clone() for name, tensor in weights.items()}
        if not path.exists():
            leaves = {name: tensor.requires_grad_() for name, tensor in mine.items()}
            polished = _grouped(group, leaves)
            steps = num_steps(len(train_on), settings.batch, settings.polish)
            course = Course("polish", steps, settings.batch, settings.lr, settings.seed)
            scale = max(energy(self.pooled_ND[train_on] - group.origin), 1e-12)

            def loss_of(step: int) -> Tensor:
                texts = course.texts(step, train_on, self.lengths)
                m = _prefix(count, course.draw(step, "prefix"))
                rows = polished.represent(self._pack(texts), m)
                loss = boost_loss(self.pooled_ND[texts], rows, scale)
                return loss + self._class_loss(polished.logits, rows, texts)

            train(
                course,
                leaves,
                loss_of,
                save_file=self.work / "training.safetensors",
                progress=self.progress,
                save_every=self.save_every,
            )
            write_tensors(path, leaves)
        polished = _grouped(group, read_tensors(path)[0])
        after = self._loss_on_held(polished, self._prefixes(polished))
        if after >= before:
            logger.warning("the polish made prefixes worse (%.4g, from %.4g) and is dropped", after, before)
            return f"dropped: mean loss of the prefixes {after:.4g}, without it {before:.4g}"
        group.students, group.factors, group.head = polished.students, polished.factors, polished.head
        return f"kept: mean loss of the prefixes {after:.4g}, without it {before:.4g}"

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

    def _prefixes(self, group: Group) -> list[Tensor]:
        """F_1 .. F_K of all texts."""
        spec = group.spec
        answers = [
            self._map(lambda batch, own=weights: answer(spec, group.shared, own, batch))  # type: ignore[misc]
            for weights in group.students
        ]
        return self._summed(group, answers)

    def _summed(self, group: Group, answers: Sequence[Tensor]) -> list[Tensor]:
        sums, prefixes = group.origin.expand_as(self.pooled_ND), []
        for factor, rows in zip(group.factors, answers, strict=True):
            sums = sums + factor * rows
            prefixes.append(sums)
        return prefixes

    def _map(self, function: Callable[[Packed], Tensor]) -> Tensor:
        """The function of every text, fp32 [N, D]."""
        result = torch.empty_like(self.pooled_ND)
        with torch.no_grad():
            for numbers in self._groups():
                result[numbers] = function(self._pack(numbers))
        return result

    def _groups(self) -> Iterator[list[int]]:
        yield from group_texts(self.lengths, EVAL_ROWS, EVAL_BATCH)

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


def _grouped(group: Group, tensors: dict[str, Tensor]) -> Group:
    """A group of the same kind over other tensors, named as the polish names them."""
    count = len(group.students)
    return Group(
        group.teacher,
        group.shared,
        group.origin,
        {name: tensors[f"head/{name}"] for name in group.head},
        [{name: tensors[f"students/{k}/{name}"] for name in group.students[k]} for k in range(count)],
        [tensors[f"factors/{k}"] for k in range(count)],
        layers=group.layers,
    )
