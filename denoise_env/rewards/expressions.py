"""The form in which a reward is written on the command line and in files.

    hps                                     a name that denoise-env list shows
    my_rewards:sharpness                    a function or class of your own, as "module:attribute"
    hps(dtype="bf16", microbatch=8)         with arguments: numbers, strings, True, False, None and lists
    threshold(clip_score, 0.3)              and rewards, which makes a reward of other rewards

There is nothing else in it: no operators, and nothing is evaluated but these calls.
"""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from denoise_env.naming import load_attribute, suggest
from denoise_env.rewards.base import Reward

_NAME = re.compile(r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?<![\w.])([A-Za-z_][\w.-]*(?::[\w.]+)?)(?!\w*\s*=)""")
_CONSTANTS = ("True", "False", "None")


def build_reward(expression: str, known: Mapping[str, str]) -> Reward:
    """The reward that an expression stands for.

    Args:
        expression: in the form above.
        known: name → "module:attribute". A class is instantiated, with no arguments where it is only named; a function
            that is named is the reward, one that is called returns it.

    Raises:
        ValueError: it is not of this form, or something in it is unknown (the message has the nearest name) or cannot
            be imported or built.
    """
    return Build(known).of(expression)


def own_code(expression: str) -> list[str]:
    """The "module:attribute" that an expression names: building it imports and runs them."""
    names = _names(expression) if "(" in expression else [expression]
    return sorted({name for name in names if ":" in name})


def strings(expression: str) -> list[str]:
    """The strings in an expression, without their quotes: paths and addresses among them."""
    return [ast.literal_eval(match[1]) for match in _NAME.finditer(expression) if match[1]]


def _names(expression: str) -> Iterator[str]:
    return (match[2] for match in _NAME.finditer(expression) if match[2] and match[2] not in _CONSTANTS)


class Build:
    """Builds what an expression's syntax tree says."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = known
        self.names: dict[str, str] = {}

    def of(self, expression: str) -> Reward:
        """The reward of a whole expression."""
        if not isinstance(expression, str) or not expression.strip():
            raise ValueError(f"unknown reward {expression!r}; {self._near(str(expression))}")
        if "(" not in expression:
            return self._build(expression)
        try:
            tree = ast.parse(_NAME.sub(self._stand_in, expression.strip()), mode="eval").body
            if not isinstance(tree, ast.Call):
                raise ValueError("this is no call")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"cannot read the reward {expression!r}: {getattr(error, 'msg', error)}; it must be a name, "
                "module:attribute, or one of these with arguments, such as threshold(clip_score, 0.3)"
            ) from error
        return self._value(tree)

    def _near(self, name: str) -> str:
        return f"{suggest(name, self.known)} Or name your own as 'module:attribute'."

    def _stand_in(self, match: re.Match[str]) -> str:
        """A name that Python's grammar takes, in the place of one with dashes, dots or a colon."""
        if match[1] or match[2] in _CONSTANTS:
            return match[0]
        stand_in = f"_{len(self.names)}"
        self.names[stand_in] = match[2]
        return stand_in

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id):
                return self._build(self.names[id])
            case ast.Call(ast.Name(id), args, keywords):
                if any(keyword.arg is None for keyword in keywords) or any(isinstance(a, ast.Starred) for a in args):
                    raise ValueError(f"the arguments of {self.names[id]} must be written out, without stars")
                named = {str(keyword.arg): self._value(keyword.value) for keyword in keywords}
                return self._build(self.names[id], [self._value(arg) for arg in args], named)
            case ast.List(items) | ast.Tuple(items):
                return [self._value(item) for item in items]
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise ValueError(
                "a reward's arguments are rewards, numbers, strings, True, False, None and lists of them, not "
                f"{self._written(node)}"
            ) from None

    def _written(self, node: ast.expr) -> str:
        return re.sub(r"\b_\d+\b", lambda match: self.names.get(match[0], match[0]), ast.unparse(node))

    def _build(self, name: str, args: list[Any] | None = None, named: dict[str, Any] | None = None) -> Any:
        target = self.known.get(name, name)
        if ":" not in target:
            raise ValueError(f"unknown reward {name!r}; {self._near(name)}")
        found = load_attribute(target, "reward")
        if args is None and not isinstance(found, type):
            return found
        if not callable(found):
            raise ValueError(f"the reward {name!r} takes no arguments: it is {type(found).__name__}")
        args, named = args or [], named or {}
        try:
            inspect.signature(found).bind(*args, **named)
        except TypeError as error:
            raise ValueError(f"cannot build the reward {name!r}: {error}; it is {name}{_arguments(found)}") from error
        except ValueError:  # some built-in functions do not tell their arguments
            pass
        try:
            return found(*args, **named)
        except (Exception, SystemExit) as error:
            message = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"cannot build the reward {name!r}: {message}") from error


def _arguments(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))
