"""Grammars that answers follow, compiled by xgrammar.

The package brings transformers along and takes seconds to import: it is loaded
when the first request asks for a grammar.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from internvl_runtime import errors
from internvl_runtime.engine import interface
from internvl_runtime.model import tokenizer

_ANY_OBJECT = '{"type": "object", "additionalProperties": true}'
_COMPILED_BYTES = 64 * 2**20
_MOST_WHITESPACE = 4
"""Characters of white space in a row: a model that likes blanks must go on at last."""


class Matcher:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import xgrammar

        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete."""
        return bool(self._matcher.is_terminated())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next: [vocabulary].

        Raises RequestError when the schema leaves none.
        """
        self._matcher.fill_next_token_bitmask(self._bitmask)
        words = self._bitmask.numpy().view(np.uint8)
        bits = np.unpackbits(words, bitorder="little")[: self._vocab_size]
        if not bits.any():
            raise _unfollowable("nothing fits it")
        return bits.astype(np.bool_)

    def accept(self, token_id: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.accept_token(token_id)


class Compiler:
    """Compiles constraints for one tokenizer, and keeps what it has compiled."""

    def __init__(self, tokens: tokenizer.Tokenizer, *, vocab_size: int) -> None:
        self._tokens = tokens
        self._vocab_size = vocab_size
        """Rows of logits, of which the tokenizer may know fewer."""

    def start(self, constraint: interface.Constraint) -> Matcher:
        """Return a matcher at the beginning of an answer.

        Raises RequestError when the schema is none or asks for what no grammar offers.
        """
        import xgrammar

        schema = constraint.schema or _ANY_OBJECT
        try:
            compiled = self._compiler.compile_json_schema(
                schema, any_whitespace=True, max_whitespace_cnt=_MOST_WHITESPACE
            )
        except Exception as e:
            # The package raises C++ errors of its own classes, which it does not list.
            raise _unfollowable(_last_line(e)) from e
        return Matcher(xgrammar.GrammarMatcher(compiled), self._vocab_size)

    @functools.cached_property
    def _compiler(self) -> Any:
        import xgrammar

        vocabulary = [self._tokens.token_bytes(token_id) for token_id in range(self._vocab_size)]
        described = xgrammar.TokenizerInfo(
            vocabulary,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=sorted(self._tokens.stop_ids),
        )
        return xgrammar.GrammarCompiler(described, cache_limit_bytes=_COMPILED_BYTES)


def _unfollowable(why: str) -> errors.RequestError:
    return errors.RequestError(
        f"response_format: the schema can not be followed: {why}; simplify it",
        parameter="response_format",
        code="invalid_schema",
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
