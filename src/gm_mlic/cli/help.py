"""Help of a command: what it does, its config groups, and each setting with its value and description."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap

from omegaconf import DictConfig, OmegaConf

from gm_mlic.cli.compose import options
from gm_mlic.cli.settings import COMMANDS, fields_of
from gm_mlic.config import SECTIONS, settings_of_section
from gm_mlic.registry import Registry
from gm_mlic.schema import Setting, as_typed

_FOOTER = (
    "--cfg job prints the composed config; -m runs all combinations of comma-separated values; --verbose prints debug "
    "messages and tracebacks; --hydra-help describes the flags of Hydra."
)


def print_help(command: str, config: DictConfig) -> None:
    """Print the help of a command, with the settings of a config composed for it."""
    width = max(40, min(100, shutil.get_terminal_size((100, 24)).columns))
    kind = COMMANDS[command]
    text = (inspect.getdoc(kind) or "").replace("::\n\n", ":\n")
    print(f"gm-mlic {command}: {text.partition('Args:')[0].rstrip()}")
    if kind.groups:
        print("\nConfig groups, set with group=option:")
    for group in kind.groups:
        listed = f"{group}: {', '.join(options(group))}"
        print(textwrap.fill(listed, width, initial_indent="  ", subsequent_indent="      "))
    print("\nSettings, changed with KEY=VALUE:")
    for key, setting in fields_of(command).items():
        _print_setting(config, key, key, setting, width)
    for section in filter(SECTIONS.__contains__, kind.groups):
        if config.get(section) is None:
            print(f"\n{section}: set {section}=OPTION.")
            continue
        name = config[section].name if isinstance(SECTIONS[section], Registry) else None
        print(f"\n{section} ({name}):" if name else f"\n{section}:")
        for key, setting in settings_of_section(section, name).items():
            _print_setting(config[section], key, f"{section}.{key}", setting, width)
    print("\n" + textwrap.fill(_FOOTER, width))


def _print_setting(parent: DictConfig, name: str, path: str, setting: Setting, width: int) -> None:
    value = OmegaConf.to_container(parent, resolve=False)[name]  # type: ignore[index, call-overload]
    print(f"  {path}={as_typed(value)}")
    text = re.split(r"(?<=[.;]) (?=If |\()", setting.text)[0] if len(setting.text) > 400 else setting.text
    expected = "" if setting.expected == "a value" else f" [{setting.expected}]"
    print(textwrap.fill(f"{text}{expected}".strip(), width, initial_indent="      ", subsequent_indent="      "))
