"""Write docs/config.md, the page of all config keys, from the schema: python tools/config_page.py."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from everest_ds.config.key_names import key_rows, section_class

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
_HEADER = "| key | values | default | meaning |\n|---|---|---|---|"
_LEAD = """# Config keys

`everest-ds keys [WORD]` lists these keys too. A key is set in a YAML file or as an override, such as
`schedule.epochs=100`: see [running](runs.md#configs). A path or name is taken as it is typed; any other value
is YAML. The [glossary](glossary.md) explains the terms.

This page is written by `python tools/config_page.py`, and a test compares it with the schema.
"""


def config_page() -> str:
    """Return the page: one table for each section of the config, preceded by the section's docstring."""
    parts = [_LEAD]
    for section, rows in groupby(key_rows(), lambda row: row["key"].rpartition(".")[0]):
        if section:
            purpose = (section_class([section]).__doc__ or "").strip().replace("\n    ", "\n")
            parts += [f"## {section}\n", f"{purpose}\n"]
        lines = [
            f"| `{row['key']}` | {row['values']} | {row['default']} | {row['meaning']} |" for row in rows
        ]
        parts.append("\n".join([_HEADER, *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(config_page())
