"""The conformance suite: what attention must do, as named claims for any attention function.

    report = conformance(flash_attention_jax.dot_product_attention)
    print(report)

Each claim compares with plain NumPy in float64 (output, lse, and every gradient under a random
cotangent), and an error may be twice that of the formula itself computed by XLA in the same dtype.
The suite knows two conventions, that of `jax.nn.dot_product_attention` and the heads-first one of
`flash_attention`; a function that lacks a feature is not blamed for it, the claim is listed as not
offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax

from flash_attention_jax._conformance.claims import CLAIMS, Claim
from flash_attention_jax._conformance.subject import Failure, NotOffered, Subject

__all__ = ["CLAIMS", "Claim", "Failure", "NotOffered", "Report", "Subject", "check", "conformance"]

Outcome = Literal["passed", "failed", "not offered"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each claim; print it for a table.

    Attributes:
        function: Name of the function.
        outcomes: By claim, "passed", "failed" or "not offered", and why.
    """

    function: str
    outcomes: dict[str, tuple[Outcome, str]]

    def _named(self, outcome: Outcome) -> tuple[str, ...]:
        return tuple(name for name, (found, _) in self.outcomes.items() if found == outcome)

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the claims that hold."""
        return self._named("passed")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the claims that do not."""
        return self._named("failed")

    @property
    def not_offered(self) -> tuple[str, ...]:
        """Names of the claims about what the function does not take."""
        return self._named("not offered")

    def __str__(self) -> str:
        """A table, a claim per line, and the counts."""
        width = max(map(len, self.outcomes), default=0)
        lines = [
            f"{name:<{width}}  {outcome:<11}  {why}".rstrip()
            for name, (outcome, why) in self.outcomes.items()
        ]
        counts = (len(self.passed), len(self.failed), len(self.not_offered))
        summary = "{}: {} passed, {} failed, {} not offered".format(self.function, *counts)
        return "\n".join([*lines, summary])


def check(claim: Claim, subject: Subject) -> tuple[Outcome, str]:
    """Try one claim.

    Args:
        claim: One of `CLAIMS`.
        subject: The function and how to call it.

    Returns:
        "passed", "failed" or "not offered", and why.
    """
    with jax.enable_x64(subject.x64):
        try:
            claim.check(subject)
        except NotOffered as reason:
            return "not offered", str(reason)
        except Failure as failure:
            return "failed", str(failure)
        except Exception as error:  # noqa: BLE001 (whatever the function raises is its answer)
            return "failed", f"raised {type(error).__name__}: {error}".splitlines()[0]
    return "passed", ""


def conformance(
    function: Callable[..., Any],
    *,
    layout: Literal["heads_last", "heads_first"] = "heads_last",
    dtype: str = "float32",
    cosine: bool = False,
    default_scale: float | None = None,
    alignment: Literal["start", "end"] | None = None,
    names: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    claims: Iterable[str] | None = None,
) -> Report:
    """Try every claim on an attention function.

    Args:
        function: Called as function(q, k, v, **options), with the names that its convention has for
            them. A feature is offered unless the signature lacks its name, or the call raises
            NotImplementedError, TypeError or ValueError.
        layout: "heads_last" for (batch, length, heads, dim) and jax.nn's names, "heads_first" for
            (batch, heads, length, dim) and the names of `flash_attention`.
        dtype: Dtype of q, k and v in the claims that are not about a dtype.
        cosine: Whether the function's similarity is the cosine, unasked.
        default_scale: The function's scale where none is passed; None = 1 / sqrt(dim).
        alignment: Whether the causal diagonal is aligned at the "start" or the "end" of the keys;
            None = at the end for "heads_first", else at the start.
        names: What the function calls options where its names differ, by their names in
            `flash_attention`.
        options: Options passed with every call, such as an implementation, by their names in
            `flash_attention`.
        claims: Names of the claims to try; None = all.

    Returns:
        A report: print it, or read `passed`, `failed`, `not_offered` and `outcomes`.

    Raises:
        ValueError: If a claim is not known.

    Example:
        >>> import jax
        >>> from flash_attention_jax.testing import conformance
        >>> report = conformance(
        ...     jax.nn.dot_product_attention,
        ...     claims=[
        ...         "causal_hides_what_lies_beyond_the_diagonal",
        ...         "row_that_sees_no_key_is_zero",
        ...     ],
        ... )
        >>> report.passed, report.failed
        (('causal_hides_what_lies_beyond_the_diagonal',), ('row_that_sees_no_key_is_zero',))
    """
    wanted = None if claims is None else set(claims)
    unknown = (wanted or set()) - {claim.name for claim in CLAIMS}
    if unknown:
        raise ValueError(
            f"`claims` must be names of claims, got {', '.join(sorted(unknown))}. "
            "See flash_attention_jax.testing.CLAIMS."
        )
    subject = Subject(
        function,
        layout=layout,
        dtype=dtype,
        cosine=cosine,
        default_scale=default_scale,
        alignment=alignment,
        names=names or {},
        fixed=options or {},
    )
    name = getattr(function, "__name__", type(function).__name__)
    return Report(
        name,
        {c.name: check(c, subject) for c in CLAIMS if wanted is None or c.name in wanted},
    )
