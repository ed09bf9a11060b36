"""What is odd about a caption's text, the same text written tidily, and templates: "a photo of {a_name}"."""

import re
import string
import unicodedata


def oddities(text):
    """Yield the codes of what is odd about a caption."""
    repaired = repaired_encoding(text)
    if repaired != text or "\ufffd" in text:
        yield "wrong_encoding"
    elif tidy(text) != text:
        yield "untidy_caption"
    if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in repaired if c > "\x7f"):
        yield "other_alphabet"


def tidy(text):
    """A caption in NFC, without control characters and doubled spaces, its encoding repaired ("cafÃ©" -> "café")."""
    text = unicodedata.normalize("NFC", repaired_encoding(text).replace("\ufeff", ""))
    text = " ".join(text.split())
    # Two invisible characters have a meaning of their own in Persian, in Indic scripts and in emoji.
    return "".join(c for c in text if c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")).strip()


def repaired_encoding(text):
    """UTF-8 that was once read as Windows' encoding, read right; any other text as it is."""
    return re.sub(r"[^\x00-\x7f]+", _read_as_utf8, text)


def _read_as_utf8(match):
    try:
        return match[0].encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return match[0]


def template_problems(flag, templates, words):
    """Yield what is wrong with caption templates that may use {word} for each of `words`."""
    known = ", ".join(f"{{{word}}}" for word in words)
    for template in templates:
        try:
            used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
            if unknown := [f"{{{name}}}" for name in used if name not in words]:
                yield f"{flag} {template!r} has {', '.join(unknown)}: only {known} are filled in"
            elif not template.format(**dict.fromkeys(words, "word")).strip():
                yield f"{flag} {template!r} gives an empty caption"
        except ValueError as error:  # a single brace, an unknown format
            yield f"{flag} {template!r}: {error}"
