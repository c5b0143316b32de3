"""Counts the multiplications of a traced function: an account of FLOP that knows nothing of ours."""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function, *args, shares=None):
    """FLOP of the matrix products and convolutions of function(*args), loops unrolled, what no output needs left out.

    Args:
      function: traceable.
      *args: arrays or shapes.
      shares: number of branches -> how often each is taken; of other conditionals, the first branch counts, of one between
        platforms the default.

    Returns:
      FLOP, two for a multiplication with its addition.
    """
    closed = jax.make_jaxpr(function)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(jaxpr, shares or {})


def _count(jaxpr, shares):
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * _size(equation.invars[0], contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1], params["dimension_numbers"].rhs_spec
            per_output = _size(kernel, numbers[1:]) / math.prod(params["lhs_dilation"])  # zeros between are no work
            total += 2 * math.prod(equation.outvars[0].aval.shape) * per_output
        elif name == "cond":
            branches = [_count(branch.jaxpr, shares) for branch in params["branches"]]
            if params.get("branches_platforms"):  # the last is what a platform without one of its own computes
                branches = branches[-1:]
            total += sum(share * flop for share, flop in zip(shares.get(len(branches), (1.0,)), branches))
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_count(inner, shares) for inner in _inside(params))
    return total


def _size(variable, axes):
    return math.prod(variable.aval.shape[axis] for axis in axes)


def _inside(params):
    for value in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
