"""Text and chat messages → the target's token ids, which are those of its ``tokenizer.json``.

What a client writes is text: the name of a control token in it is spelt out like any other word.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2.meta
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

ROLES = ("system", "developer", "user", "assistant", "tool")
CONTENT = ("content", "reasoning_content", "name", "tool_call_id")  # fields of a message that are text
JOINT = "\ufdd0d2sd\ufdd1"  # of noncharacters, which no text holds; stands in clients' text where a control token is spelt out
OURS = {"messages", "add_generation_prompt"}  # what a template is given anyway
MARK = re.compile(r"[^\w\s].*\w.*[^\w\s]")  # a word between signs: no run of spaces, and no word of anyone's text
LEVELS = 100  # of lists and objects within each other; templates, which go through them, too, have Python's own limit
SHOWN = 200  # characters of what a client wrote, in an error
TURNS = (("system", "user", "assistant", "user"), ("user", "assistant", "user"))  # of a plain chat; some have no system


class ChatFormat:
    """A target's chat templates and the special tokens that they name.

    Attributes:
        templates: by name; ``default`` is the usual one. tokens: ``bos_token`` and the like.
    """

    def __init__(self, folder: Path) -> None:
        config = _json(folder / "tokenizer_config.json")
        named = _json(folder / "special_tokens_map.json") | config
        named = {name: value["content"] if isinstance(value, dict) else value for name, value in named.items()}
        self.tokens = {name: value for name, value in named.items() if name.endswith("_token") and isinstance(value, str)}
        given = config.get("chat_template") or {}
        if isinstance(given, list):
            given = {one["name"]: one["template"] for one in given}
        self.templates: dict[str, str] = {"default": given} if isinstance(given, str) else given
        for file in (folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")):
            if file.exists():
                self.templates["default" if file.stem == "chat_template" else file.stem] = file.read_text(encoding="utf-8")

    def render(self, messages: list[dict[str, Any]], arguments: Mapping[str, Any], *, opened: bool, continued: bool) -> str:
        """Put messages through the template.

        Args:
            arguments: for the template's own variables; ``tools`` picks a template of their own where there is one.
            opened: whether the opening of an answer follows them. continued: whether the last one is left open.

        Raises:
            ValueError: there is no template that can be read, it has no such variable, or refuses the messages.
        """
        name = "tool_use" if arguments.get("tools") and "tool_use" in self.templates else "default"
        template = self.templates.get(name)
        if template is None:
            raise ValueError("messages: the target has no chat template; use text_input")
        try:
            environment = _compile_jinja_template(template).environment
            variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateError as error:
            raise ValueError(f"messages: the target's chat template cannot be read ({_line(error)}); use text_input") from None
        allowed = sorted(variables - environment.globals.keys() - self.tokens.keys() - OURS)
        for argument in arguments:
            if argument not in allowed:
                known = ", ".join(allowed) or "none, the target's template has no variables"
                raise ValueError(f"chat_template_kwargs.{_key(argument)}: unknown, allowed: {known}")
        given: dict[str, Any] = {"add_generation_prompt": opened, "continue_final_message": continued}
        given |= {**self.tokens, **arguments}
        try:
            chats: Any = render_jinja_template([messages], chat_template=template, **given)
        except Exception as error:  # a template refuses by raising whatever it likes
            raise ValueError(f"messages: the target's chat template refuses them ({_line(error)})") from None
        return str(chats[0][0])

    def names(self, token: str) -> bool:
        """Whether the text of a token stands in a template."""
        return any(token in template for template in self.templates.values())

    def turn_marks(self, tokens: Iterable[str]) -> list[str]:
        """Those of some tokens that the turns of a plain chat begin or end with, and would in a message's content, too.

        What the template itself looks for in a content (``</think>`` in an assistant's, for one) is none of them.
        """
        for roles in TURNS:
            with suppress(ValueError):  # no such roles, or no template
                plain = self._plain(roles, JOINT)
                contents = {token: f"{JOINT}{token}{JOINT}" for token in tokens if token in plain}
                return [
                    token
                    for token, content in contents.items()
                    if self._plain(roles, content).count(content) == plain.count(JOINT)
                ]
        return []

    def _plain(self, roles: Iterable[str], content: str) -> str:
        return self.render([{"role": role, "content": content} for role in roles], {}, opened=False, continued=False)


class Prompts:
    """A target's tokenizer and chat format.

    Control tokens are those that the tokenizer calls special, and marks of turns that it does not (``<｜User｜>`` of
    DeepSeek-R1's distilled models). What else a template names is a word of both sides (``<think>``, ``<tool_call>``): answers
    show it, clients send it back, and the template may look for it; spelt out it would be another. So it is only in what a
    tool returned.

    Args:
        folder: with ``tokenizer.json`` and what else a Hugging Face tokenizer is saved as.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.chat_format = ChatFormat(folder)
        added = self.tokenizer.get_added_tokens_decoder().values()
        words = {token.content: token for token in added if not token.special and MARK.fullmatch(token.content)}
        marks = [words.pop(text) for text in self.chat_format.turn_marks(words)]
        for token in marks:
            token.special = True
        self.tokenizer.add_special_tokens(marks)
        control = [token.content for token in added if token.special]
        self._control = _any_of(control)
        self._in_results = _any_of([*control, *filter(self.chat_format.names, words)])
        self.tokenizer.add_special_tokens([AddedToken(JOINT, normalized=False, special=True)])
        self._joint = self.tokenizer.token_to_id(JOINT)

    def text(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of a text, behind what the tokenizer puts before every text.

        Args:
            parse_special: whether the text of a control token in it stands for that token.

        Raises:
            ValueError: the tokenizer has no ids for it.
        """
        return self._encode("text_input", text, literal=not parse_special, opened=True)

    def chat(self, messages: str, arguments: str | None = None, *, opened: bool = True, continued: bool = False) -> list[int]:
        """The ids of a chat.

        Args:
            messages: a JSON list of messages. arguments: a JSON object, for the variables of the chat template.
            opened: whether the opening of an answer follows them.
            continued: whether the last message is left open instead, so that the answer goes on with it.

        Raises:
            ValueError: naming what is wrong in them.
        """
        try:
            given = _parse("chat_template_kwargs", arguments) if arguments else {}
            if not isinstance(given, dict):
                raise ValueError("chat_template_kwargs: allowed: a JSON object of variables of the chat template")
            checked = check_messages(_parse("messages", messages))
            spelt = [_spell(message, self._in_results if message["role"] == "tool" else self._control) for message in checked]
            values = {name: _spell(value, self._control) for name, value in given.items()}
            if opened and continued:
                raise ValueError("continue_final_message: found beside add_generation_prompt, allowed: one of the two")
            if continued and not spelt[-1].get("content"):
                raise ValueError("continue_final_message: found behind a message without text, allowed: one with")
        except RecursionError:
            raise ValueError(f"messages, chat_template_kwargs: found JSON of too many levels, allowed: {LEVELS}") from None
        rendered = self.chat_format.render(spelt, values, opened=opened, continued=continued)
        return self._encode("messages", rendered, literal=False, opened=False)

    def _encode(self, name: str, text: str, *, literal: bool, opened: bool) -> list[int]:
        self.tokenizer.encode_special_tokens = literal
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=opened).ids
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise ValueError(f"{name}: the target's tokenizer refuses it ({_line(error)})") from None
        return [token for token in ids if token != self._joint]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some texts; one of a single sign cannot be spelt in another way."""
    longest_first = sorted((re.escape(text) for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")


def _spell(value: Any, control: re.Pattern[str], levels: int = LEVELS) -> Any:
    """Clients' data with a joint in every text that would be taken for a control token.

    Raises:
        RecursionError: there are more levels.
    """
    if levels < 0:
        raise RecursionError
    if isinstance(value, str):
        value = value.replace(JOINT, "")
        while control.search(value):  # breaking one up may leave another
            value = control.sub(lambda found: f"{found[0][0]}{JOINT}{found[0][1:]}", value)
        return value
    if isinstance(value, list):
        return [_spell(one, control, levels - 1) for one in value]
    if isinstance(value, dict):
        return {_spell(key, control): _spell(one, control, levels - 1) for key, one in value.items()}
    return value


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages, in their usual form.

    Raises:
        ValueError: naming the message and field, what was found and what is allowed.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: allowed: a JSON list of at least one object with role and content")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or "role" not in message or not message.keys() & {"content", "tool_calls"}:
            raise ValueError(f"{where}: allowed: an object with role and content")
        if unknown := message.keys() - {"role", "tool_calls", *CONTENT}:
            raise ValueError(f"{where}.{_key(min(unknown))}: unknown, allowed: role, tool_calls, {', '.join(CONTENT)}")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}.role: found {repr(message['role'])[:SHOWN]}, allowed: {', '.join(ROLES)}")
        for field in message.keys() & set(CONTENT):
            absent = message[field] is None and (field != "content" or "tool_calls" in message)
            if not absent and not isinstance(message[field], str):
                raise ValueError(f"{where}.{field}: found {type(message[field]).__name__}, allowed: text")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"{where}.tool_calls: allowed: a list of objects")
    return [{field: value for field, value in message.items() if value is not None} for message in messages]


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None


def _line(error: Exception) -> str:
    """What an error of others' says, which may hold anything that a client wrote, as a line that can be sent."""
    return " ".join(str(error)[:SHOWN].encode("utf-8", "replace").decode().split())


def _key(key: str) -> str:
    """A client's key, as it may stand in an error."""
    return repr(key)[1:-1][:SHOWN]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
