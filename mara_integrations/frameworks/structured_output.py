"""LangChain's parsers of structured output, made strict: what was cut or is not JSON is an error, never completed."""

from __future__ import annotations

import json
from typing import Annotated, Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import (
    BaseCumulativeTransformOutputParser,
    BaseOutputParser,
    JsonOutputParser,
    PydanticOutputParser,
)
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import SkipValidation

from mara_integrations.errors import CutReplyError


class CutObjectError(CutReplyError, OutputParserException):
    """`max_tokens` cut a reply before its object was whole; LangChain's parsing error."""


def object_parser(schema: Any) -> WholeObjectParser:
    """Return the parser of replies that are an object of `schema`; None allows any JSON."""
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    return WholeObjectParser(parser=parser)


def arguments_parser(schema: Any) -> WholeObjectParser:
    """Return the parser of replies that are a call, whose arguments are an object of `schema`."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return WholeObjectParser(parser=PydanticToolsParser(tools=[schema], first_tool_only=True), is_call=True)
    name = convert_to_openai_tool(schema)["function"]["name"]
    return WholeObjectParser(parser=JsonOutputKeyToolsParser(key_name=name, first_tool_only=True), is_call=True)


class WholeObjectParser(BaseCumulativeTransformOutputParser[Any]):
    """Parses with one of LangChain's parsers, but takes no end of a reply that is not whole.

    LangChain's parsers complete JSON that breaks off. While a reply is streamed that is wanted; at its end, which its
    `finish_reason` tells, the values would be invented.

    Attributes:
        parser: LangChain's parser.
        is_call: Whether the object is the arguments of a call, else the text.
    """

    parser: Annotated[BaseOutputParser[Any], SkipValidation()]
    is_call: bool = False

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Parse a reply, or what is there of it.

        Raises:
            CutObjectError: If `max_tokens` cut the reply.
            OutputParserException: If the reply ended and is not an object of the schema.
        """
        message = result[0].message if isinstance(result[0], ChatGeneration) else None
        reason = message.response_metadata.get("finish_reason") if isinstance(message, AIMessage) else None
        if reason is None:
            return self.parser.parse_result(result, partial=partial)
        assert isinstance(message, AIMessage)
        if reason == "length":
            num_tokens = message.usage_metadata["output_tokens"] if message.usage_metadata else "max_tokens"
            error = f"the reply was cut after {num_tokens} tokens, before its object was whole"
            raise CutObjectError(error, hint="raise max_tokens, or bound its strings with maxLength")
        if self.is_call:
            _check_call(message)
        else:
            _check_json(message)
        return self.parser.parse_result(result)

    def parse(self, text: str) -> Any:
        """Parse a text."""
        return self.parser.parse(text)

    @property
    def OutputType(self) -> Any:  # LangChain's name
        """What the parser returns, as LangChain shows it."""
        return self.parser.OutputType

    @property
    def _type(self) -> str:
        return "mara_whole_object"


def _check_json(message: AIMessage) -> None:
    try:
        json.loads(message.text)
    except ValueError as error:
        raise OutputParserException(f"the reply is not valid JSON: {error}", llm_output=message.text) from error


def _check_call(message: AIMessage) -> None:
    if not message.tool_calls:
        invalid = message.invalid_tool_calls
        reason = f"its call is invalid: {invalid[0]['args']!r}" if invalid else f"it calls nothing: {message.text!r}"
        raise OutputParserException(f"the reply has no arguments: {reason}", llm_output=message.text)
