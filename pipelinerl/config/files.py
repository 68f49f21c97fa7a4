"""Where the YAML files are and what they offer. Standard library only, so that `--help` can list them at once."""

from pathlib import Path

from pipelinerl.errors import EnvironmentProblem


def conf_dir() -> Path:
    """The `conf/` directory beside the package.

    Raises: EnvironmentProblem when it is not there, which means that only the package was installed.
    """
    directory = Path(__file__).resolve().parents[2] / "conf"
    if not (directory / "config.yaml").is_file():
        raise EnvironmentProblem(
            f"the configuration files are missing: {directory}/config.yaml; "
            "install from a checkout: ./scripts/install.sh, or pip install --editable <checkout>"
        )
    return directory


def group_options() -> dict[str, list[str]]:
    """The config groups and the options of each: `{"task": ["jsonl", "sort", ...], ...}`, both sorted."""
    groups = sorted(entry for entry in conf_dir().iterdir() if entry.is_dir())
    return {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}
