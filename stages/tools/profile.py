"""Write the settings of a profile into params.yaml, which keeps its comments and all other values.

`python -m stages.tools.profile NAME [KEY=VALUE ...]` applies profiles/NAME.yaml and then the given
values, as `dvc exp run -S` takes them: ``evaluate.dataset=path/to/mine``. Nothing is written unless
the result is valid; `git diff params.yaml` shows it and `git checkout params.yaml` undoes it.
"""

import argparse
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_file
from stages.checking.params import Params
from stages.pipeline.params import PARAMS_FILE, load_params, read_yaml, suggest

PROFILES = Path("profiles")


def read_profile(name: str) -> dict[str, Any]:
    """Return the settings of a profile, by dotted key.

    Raises
    ------
    UserError
        If there is none of that name, or the file holds no settings.
    """
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"{PROFILES}: no profile {name!r}{suggest(name, known)} "
            f"(known: {', '.join(known) or 'none'}); run from the root of the repository"
        )
    path = PROFILES / f"{name}.yaml"
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: holds no settings; write them as in {PARAMS_FILE}")
    return dict(_flatten(values))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``KEY=VALUE`` arguments, read as YAML, by dotted key.

    Raises
    ------
    UserError
        If one has another form.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise UserError(f"{setting!r}: is not KEY=VALUE; write evaluate.dataset=path, say")
        try:
            values[key] = YAML(typ="safe", pure=True).load(text)
        except (YAMLError, ValueError) as error:
            raise UserError(f"{setting!r}: the value is not valid YAML ({error})") from None
    return values


def apply(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a params.yaml with new values; comments and layout stay as they are.

    Parameters
    ----------
    text
        A valid params.yaml.
    values
        New values by dotted key.

    Raises
    ------
    UserError
        If a section of a key does not exist; whether the last part may is for the schema to say.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # never fold a line
    yaml.representer.add_representer(
        type(None),
        lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null"),
    )
    document = yaml.load(text)
    for key, value in values.items():
        *sections, last = key.split(".")
        section: Any = document
        for name in sections:
            if not isinstance(section, dict) or name not in section:
                known = section if isinstance(section, dict) else ()
                raise UserError(f"{PARAMS_FILE}: {key}: no section {name!r}{suggest(name, known)}")
            section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{PARAMS_FILE}: {key}: {sections[-1]} is no section")
        if isinstance(section.get(last), list) and isinstance(value, list):
            section[last][:] = value  # keeps its style
        else:
            section[last] = value
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()


def check(text: str) -> None:
    """Validate the text of a params.yaml.

    Raises
    ------
    UserError
        Naming the key that is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PARAMS_FILE
        path.write_text(text, encoding="utf-8")
        try:
            load_params(Params, path)
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(
                f"{PARAMS_FILE} would be wrong: {reason}; nothing was written"
            ) from None


def main() -> None:
    """Apply a profile to params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m stages.tools.profile", description=__doc__)
    parser.add_argument("name", help="a file of profiles/, without .yaml")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further values")
    args = parser.parse_args()
    load_params(Params)  # what is wrong already is not the profile's doing
    values = {**read_profile(args.name), **parse_settings(args.settings)}
    text = apply(PARAMS_FILE.read_text(encoding="utf-8"), values)
    check(text)
    write_file(PARAMS_FILE, text.encode())
    for key, value in values.items():
        print(f"{key}: {value}")
    print(f"\n{PARAMS_FILE} is changed: `git diff {PARAMS_FILE}` shows it, `make repro` runs it")


if __name__ == "__main__":
    run(main)
