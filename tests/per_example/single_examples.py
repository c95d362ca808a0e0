"""Gradients by autograd on one example at a time, and those of `ExampleGradients` in the same form."""

import torch

from hf_ft_ext.per_example.gradients import ExampleGradients
from hf_ft_ext.per_example.state import computing_in, evaluating
from hf_ft_ext.per_example.types import dense


def plain(model, function, inputs, parameters):
    """Autograd on one example at a time: for each scalar, gradients `[n, *shape]` by name."""
    found = []
    with evaluating(model), computing_in(model, torch.float64):
        for i in range(len(inputs["input_ids"])):
            scalars = function(model, {key: value[i : i + 1] for key, value in inputs.items()})
            for c in range(scalars.shape[1]):
                values = list(parameters.values())
                grads = torch.autograd.grad(scalars[0, c], values, retain_graph=True, allow_unused=True)
                found.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, values, strict=True)])
    classes = scalars.shape[1]
    return [
        {name: torch.stack([row[k] for row in found[c::classes]]) for k, name in enumerate(parameters)}
        for c in range(classes)
    ]


def gathered(examples, inputs):
    """The gradients of `ExampleGradients` in the form of `plain`."""
    parts = list(examples(inputs))
    found = []
    for c in range(len(parts[0].gradients)):
        found.append({})
        for name, parameter in examples.parameters.items():
            rows = [
                dense(part.gradients[c][name])
                if name in part.gradients[c]
                else parameter.new_zeros(len(part.scalars), *parameter.shape)
                for part in parts
            ]
            found[c][name] = torch.cat(rows)
    return found


def assert_equal(model, inputs, function=lambda model, batch: model(**batch).logits, parameters=None):
    examples = ExampleGradients(model, function, parameters)
    found, expected = gathered(examples, inputs), plain(model, function, inputs, examples.parameters)
    size = max(float(value.abs().max()) for grads in expected for value in grads.values())
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12 * size, msg=name)
    return examples
