"""Groups of students with random weights, in memory and as folders."""

import json

import torch
from text_models import CONFIGS, tokenizer

from zinfer.spec.read import read_spec
from zinfer.students.group import Group, write_group
from zinfer.students.student import OFFSET, PROJECTION, head_names, layer_shapes, shared_names, student_spec

COUNT, LAYERS = 3, 2


def shapes(spec):
    """Of every tensor by its published name."""
    found = {weight.name: weight.shape for op in spec.program for weight in op.weights}
    return found | {row.name: (row.num_rows, row.width) for row in spec.lookups}


def make_group(family="bert", width=None, **changes):
    """A group with random weights of order 1; nothing in it is alike between students."""
    teacher = read_spec(CONFIGS[family] | changes)
    draw = torch.Generator().manual_seed(9)

    def tensor(name, shape):
        if len(shape) == 2:
            return torch.randn(shape, generator=draw) * (1 if "embeddings." in name else shape[1] ** -0.5)
        return torch.randn(shape, generator=draw) * 0.1 + (
            1.0 if "norm" in name.lower() and "bias" not in name else 0
        )

    published = shapes(teacher)
    head = head_names(teacher)
    own = layer_shapes(student_spec(teacher, LAYERS, width))
    wide = teacher.model_dim
    students = [
        {name: tensor(name, shape) for name, shape in own.items()}
        | {PROJECTION: tensor("matrix", (wide, wide)), OFFSET: tensor("bias", (wide,))}
        for _ in range(COUNT)
    ]
    classes = len(teacher.encoder.labels)
    return Group(
        teacher,
        {name: tensor(name, published[name]) for name in shared_names(teacher) if name not in head},
        tensor("bias", (wide,)),
        {name: tensor(name, published[name]) for name in head},
        students,
        list(torch.tensor([1.0, 0.6, -0.4])),
        torch.tensor([0.7, 1.0, 1.4]),
        0.1 * torch.randn(COUNT, classes, generator=draw),
        LAYERS,
        width,
    )


def write_group_folder(path, group=None, **notes):
    """A group as `Classifier` opens it; returns the folder."""
    path.mkdir()
    write_group(group or make_group(), path, {"prefixes": []} | notes)
    (path / "config.json").write_text(json.dumps(CONFIGS["bert"]))
    tokenizer().save(str(path / "tokenizer.json"))
    return path
