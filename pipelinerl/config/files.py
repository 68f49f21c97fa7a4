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
    """The config groups and their options, both sorted: `{"algo": ["cispo", ...], "algo/correction": [...], ...}`."""
    root = conf_dir()
    groups = sorted(folder.relative_to(root).as_posix() for folder in root.rglob("*") if folder.is_dir())
    return {group: sorted(file.stem for file in (root / group).glob("*.yaml")) for group in groups}
