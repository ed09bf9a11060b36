"""Caption templates: "a photo of {a_name}"."""

import string


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
