"""How much memory a traced program needs at its worst moment, without compiling it.

`peak` walks a jaxpr in its order, as compilers do within a fusion or two, and adds up the arrays
that are held at each operation:

- Elementwise operations, and those that only move elements, are fused into what reads them and
  need no memory, unless a product, a loop or another operation that cannot take them in reads
  them, or several operations read them and they are dear (exp, a division) or read arrays as
  large as they make.
- What a fused operation reads is held until the operation that it is fused into.
- A loop holds its carry and what it stacks, and, once, what its body needs.
- Of a condition whose value is known, as compilers know it (`memjax.uniform`), one branch runs.
- Where an input dies at an elementwise operation of the same size, the result takes its place.
- On a mesh an array counts with the part that a device has (`memjax.spread`); to cut it
  into more parts is fused, and what is gathered is another array.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from memjax import spread
from memjax.programs import called
from memjax.spread import Split
from memjax.uniform import Parts, follow, literal
from pallas_kernels.dispatch import current_target

INLINED = {
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map", "custom_lin", "run_state",
}  # fmt: skip
SAME = {
    "reshape", "squeeze", "expand_dims", "sharding_constraint", "optimization_barrier", "name",
    "stop_gradient", "copy", "copy_p", "bitcast_convert_type", "random_wrap", "random_unwrap",
    "pvary", "pcast", "device_put",
}  # fmt: skip
DEAR = {
    "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "div", "rsqrt", "sqrt", "pow",
    "erf", "erf_inv", "sin", "cos", "atan2", "cbrt", "rem", "random_bits", "threefry2x32",
}  # fmt: skip
ALONE = {
    "dot_general", "conv_general_dilated", "sort", "cumsum", "cumlogsumexp", "cummax", "cumprod",
    "scatter", "scatter-add", "scatter_add", "top_k", "cholesky", "triangular_solve",
    "lu", "eigh", "fft", "argmax", "argmin", "ppermute", "psum", "all_gather", "all_to_all",
    "custom_call", "pallas_call", "reduce_window_sum", "approx_top_k", "dynamic_update_slice",
}  # fmt: skip
MADE_ONCE = {"broadcast_in_dim", "iota", "convert_element_type", "full"}
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "reduce",
}  # fmt: skip


def size_of(aval: Any, split: Split = ()) -> int:
    """Bytes of an array, or of a part of it; random keys as the two words that they hold."""
    if not hasattr(aval, "shape"):
        return 0
    key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)
    elements = math.prod(aval.shape) // math.prod(split)
    return elements * (8 if key else np.dtype(aval.dtype).itemsize)


class Step(NamedTuple):
    """An operation. kind: "same", "fused", "reduced", "alone". extra: bytes while it runs.

    carried: of what it makes, so many, the first, may take the place of what it reads.
    """

    name: str
    kind: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    extra: int = 0
    carried: int = 0


class _Program:
    """The operations of a jaxpr with its calls inlined; values are numbers, with their bytes."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.bytes: list[int] = []
        self.splits: list[Split] = []
        self.constants: dict[str, list[int]] = {}
        self.known: dict[int, Any] = {}  # of values, as in `memjax.uniform`

    def value(self, aval: Any, known: Any = None, split: Split | None = None) -> int:
        split = (1,) * len(getattr(aval, "shape", ())) if split is None else split
        self.bytes.append(size_of(aval, split))
        self.splits.append(split)
        if known is not None:
            self.known[len(self.bytes) - 1] = known
        return len(self.bytes) - 1

    def read(self, jaxpr: Any, given: Sequence[int], consts: Sequence[int]) -> list[int]:
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, given))

        def at(var: Any) -> int:
            return -1 if isinstance(var, Literal) else values[var]

        for eqn in jaxpr.eqns:
            reads = [at(var) for var in eqn.invars]
            known = [
                literal(var) if read < 0 else self.known.get(read)
                for var, read in zip(eqn.invars, reads)
            ]
            splits = [self._split(var, read) for var, read in zip(eqn.invars, reads)]
            inner = called(eqn) if eqn.primitive.name in INLINED else None
            if eqn.primitive.name == "cond" and known[0] is not None:
                closed = eqn.params["branches"][int(known[0])]
                inner = closed.jaxpr, closed.consts
            if eqn.primitive.name == "shard_map":
                made = self._read_parts(eqn, inner, reads, known)
            elif inner is not None:
                made = self._read_inner(inner, reads, known)
            else:
                made = self._add(eqn, reads, known, splits)
            values.update(zip(eqn.outvars, made))
        return [at(var) for var in jaxpr.outvars]

    def _read_inner(self, inner: tuple[Any, Sequence[Any]], reads: list[int], known: list[Any]):
        """What an operation makes that is a program, or of which one branch is taken."""
        body, closed = inner
        first = len(reads) - len(body.invars)
        given = [
            self.value(var.aval, number) if read < 0 and number is not None else read
            for var, read, number in zip(body.invars, reads[first:], known[first:])
        ]
        return self.read(body, given, [-1] * len(closed))

    def _split(self, var: Any, read: int) -> Split:
        return (1,) * len(getattr(var.aval, "shape", ())) if read < 0 else self.splits[read]

    def _read_parts(self, eqn: Any, inner: Any, reads: list[int], known: list[Any]) -> list[int]:
        """What is made of the parts of a device: they are arrays within, and parts outside."""
        taken, made = spread.parts_of(eqn)
        given = [
            -1 if read < 0 else self._part(read, inside.aval, _moved(self.splits[read], taken))
            for read, inside, taken in zip(reads, inner[0].invars, taken)
        ]
        outs = self._read_inner(inner, given, known)
        whole = zip(outs, (var.aval for var in eqn.outvars), made)
        return [self._part(out, aval, "same", split) for out, aval, split in whole]

    def _part(self, value: int, aval: Any, kind: str, split: Split | None = None) -> int:
        """The value under the shape that it has within, or outside."""
        again = self.value(aval, self.known.get(value), split)
        self.steps.append(Step("part", kind, (value,), (again,)))
        return again

    def _add(self, eqn: Any, reads: list[int], known: list[Any], splits: list[Split]) -> list[int]:
        """What an operation makes, which is one of the steps."""
        if eqn.primitive.name in MADE_ONCE:
            taken = [str(v) if r < 0 else r for v, r in zip(eqn.invars, reads)]
            same = str((eqn.primitive, taken, [v.aval for v in eqn.outvars], eqn.params))
            if same in self.constants:
                return self.constants[same]
            self.constants[same] = [len(self.bytes) + i for i in range(len(eqn.outvars))]
        found = [_branch(eqn)] if eqn.primitive.name == "platform_index" else follow(eqn, known)
        after = spread.follow(eqn, splits)
        makes = [self.value(var.aval, *each) for var, *each in zip(eqn.outvars, found, after)]
        kind, extra = _kind(eqn, known, splits)
        if eqn.primitive.name == "sharding_constraint":
            kind = _moved(splits[0], after[0])
        real = tuple(r for r in reads if r >= 0)
        carried = _carried(eqn, kind)
        self.steps.append(Step(eqn.primitive.name, kind, real, tuple(makes), extra, carried))
        return makes


def _branch(eqn: Any) -> int:
    """Which branch of `jax.lax.platform_dependent` this platform takes."""
    platform, given = current_target().platform, eqn.params["platforms"]
    names = {"gpu": ("cuda", "rocm", "gpu")}.get(platform, (platform,))
    default = len(given) - 1
    return next((i for i, of in enumerate(given) if of and {*of} & {*names}), default)


def _moved(before: Split, after: Split) -> str:
    """The kind of a step that splits an array otherwise: it is as it was, cut, or sent."""
    if before == after:
        return "same"
    return "fused" if all(new % old == 0 for old, new in zip(before, after)) else "alone"


def _kind(eqn: Any, known: list[Any], splits: list[Split]) -> tuple[str, int]:
    name = eqn.primitive.name
    if name == "scan":
        closed, fixed = eqn.params["jaxpr"], eqn.params["num_consts"]
        splits = spread.of_turn(eqn, splits)
        return "alone", _body(closed.jaxpr, fixed, eqn.params["num_carry"], known, splits)
    if name == "while":
        closed, first = eqn.params["body_jaxpr"], eqn.params["cond_nconsts"]
        fixed = eqn.params["body_nconsts"]
        carried = len(closed.jaxpr.invars) - fixed
        splits = spread.of_turn(eqn, splits)
        return "alone", _body(closed.jaxpr, fixed, carried, known[first:], splits)
    if name == "cond":
        taken = len(eqn.invars) - 1
        branches = eqn.params["branches"]
        each = (peak(one.jaxpr, over=(0, taken), splits=splits[1:]) for one in branches)
        return "alone", max(each)
    if name == "dot_general":
        return "alone", _rearranged(eqn, splits)
    if name in SAME or (name == "transpose" and _moves_nothing(eqn)):
        return "same", 0
    if name in REDUCTIONS:
        return "reduced", 0
    return ("alone" if name in ALONE else "fused"), 0


def _carried(eqn: Any, kind: str) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["num_carry"]
    whole = kind == "fused" or eqn.primitive.name in ("while", "cond")
    return len(eqn.outvars) if whole else 0


def _moves_nothing(eqn: Any) -> bool:
    shape, order = eqn.invars[0].aval.shape, eqn.params["permutation"]
    kept = [i for i in order if shape[i] > 1]
    return kept == sorted(kept)


def _rearranged(eqn: Any, splits: list[Split]) -> int:
    """Bytes of the operands of a batched product that lie in another order than it reads them."""
    _, batch = eqn.params["dimension_numbers"]
    total = 0
    for var, lead, split in zip(eqn.invars, batch, splits):
        if lead and tuple(lead) != tuple(range(len(lead))):
            total += size_of(var.aval, split)
    return total


def _body(jaxpr: Any, fixed: int, carried: int, known: list[Any], splits: Sequence[Split]) -> int:
    """Bytes that one turn of a loop needs, besides its carry and what it reads and stacks."""
    stacked = len(jaxpr.outvars) - carried
    sliced = fixed + carried
    alike = [None if isinstance(value, Parts) else value for value in known]
    alike[fixed:sliced] = [None] * carried
    over = fixed, sliced
    return peak(jaxpr, stacked=stacked, over=over, sliced=sliced, known=alike, splits=splits)


def peak(
    jaxpr: Any,
    *,
    over: tuple[int, int] = (0, 0),
    stacked: int = 0,
    sliced: int | None = None,
    known: Sequence[Any] | None = None,
    splits: Sequence[Split] | None = None,
) -> int:
    """Bytes of the arrays that the program holds at its worst moment, without its inputs.

    over: inputs from the first of these to the second may be written over.
    stacked: the last outputs, so many, are written into arrays that the caller holds.
    sliced: inputs from this one on are slices of arrays of the caller.
    known: the one value of all elements of an input, or None.
    splits: the parts of each axis of an input that devices hold; without them inputs are whole.
    """
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    program = _Program()
    numbers = [None] * len(jaxpr.invars) if known is None else known
    each = [None] * len(jaxpr.invars) if splits is None else splits
    given = [program.value(v.aval, *pair) for v, *pair in zip(jaxpr.invars, numbers, each)]
    consts = [program.value(var.aval) for var in jaxpr.constvars]
    slices = [] if sliced is None else given[sliced:]
    program.steps += [Step("slice", "fused", (), (value,)) for value in slices]
    outside = {*given, *consts} - {*slices}
    outs = program.read(jaxpr, given, consts)
    kept = {out for out in outs[: len(outs) - stacked] if out >= 0}
    return _Walk(program, outside, kept, set(given[slice(*over)])).most()


class _Walk:
    """The operations in order, and what is held at each.

    outside: values of the caller. kept: held to the end. over: of the caller, may be written over.
    """

    def __init__(self, program: _Program, outside: set[int], kept: set[int], over: set[int]):
        self.steps, self.bytes, count = program.steps, program.bytes, len(program.bytes)
        self.outside, self.over = outside, over
        self.held = self._find_held(kept, count)
        self.sources: list[frozenset[int]] = [frozenset()] * count
        self.last, self.born = [-1] * count, [-1] * count
        self._find_lives(kept)

    def _find_held(self, kept: set[int], count: int) -> list[bool]:
        """Which values are arrays in memory: those that are not fused into all that reads them."""
        readers = [0] * count
        for step in self.steps:
            for value in set(step.reads):
                readers[value] += 1
        held, whole = [False] * count, [value in kept for value in range(count)]
        for step in reversed(self.steps):
            for value in step.makes:
                dear = readers[value] > 1 and (step.name in DEAR or self._wide(step))
                held[value] = step.kind in ("alone", "reduced") or (
                    step.kind == "fused" and (whole[value] or dear)
                )
            if step.kind == "alone" or (step.kind == "same" and whole[step.makes[0]]):
                for read in step.reads:
                    whole[read] = True
        return held

    def _wide(self, step: Step) -> bool:
        """Whether it reads an array of its own size, which being made twice would read twice."""
        size = self.bytes[step.makes[0]]
        return any(self.bytes[read] >= size > 64 for read in set(step.reads))

    def _find_lives(self, kept: set[int]) -> None:
        """From when to when each array is held; what is fused reads where it is fused into."""
        for value in self.outside:
            self.sources[value] = frozenset((value,))
        for time, step in enumerate(self.steps):
            under = self.under(step)
            if step.kind == "reduced":  # at once: it frees more than it takes
                time = max((self.born[source] for source in under), default=time)
            for value in step.makes:
                self.sources[value] = frozenset((value,)) if self.held[value] else under
                self.born[value] = time
            if any(self.held[value] for value in step.makes):
                for source in under:
                    self.last[source] = max(self.last[source], time)
        for value in kept:
            for source in self.sources[value]:
                self.last[source] = len(self.steps)

    def under(self, step: Step) -> frozenset[int]:
        """The arrays that an operation reads, through what is fused into it."""
        return frozenset().union(*(self.sources[read] for read in step.reads))

    def most(self) -> int:
        """Bytes at the worst moment."""
        ends: list[list[int]] = [[] for _ in range(len(self.steps) + 1)]
        for value, is_held in enumerate(self.held):
            if is_held and value not in self.outside:
                ends[max(self.last[value], self.born[value])].append(value)
        now, most, size = 0, 0, list(self.bytes)
        for time, step in enumerate(self.steps):
            made = [value for value in step.makes if self.held[value]]
            if made:
                if step.name == "cond":  # what it makes is born within
                    most = max(most, now + step.extra)
                gone = [v for v in ends[time] if v not in made]
                for value in made[: step.carried]:
                    place = self._place(step, value, time, gone, size)
                    if place in self.over:
                        size[value] = 0
                    elif place >= 0:
                        gone.remove(place)
                        now -= size[place]
                    now += size[value]
                now += sum(size[value] for value in made[step.carried :])
                most = max(most, now + (0 if step.name == "cond" else step.extra))
            for value in ends[time]:
                now -= size[value] if value in made or value in (gone if made else ()) else 0
        return most

    def _place(self, step: Step, value: int, time: int, gone: list[int], size: list[int]) -> int:
        """An array of the same size that dies as `value` is made, or -1."""
        for read in self.under(step):
            dies = self.bytes[read] == self.bytes[value] and self.last[read] <= time
            if dies and (read in self.over or (read in gone and size[read])):
                return read
        return -1
