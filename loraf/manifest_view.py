"""The part of a checkpoint that follows from its manifest: A of every module. Reads no task files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from loraf import manifest as manifests
from loraf.errors import CheckpointError, CorruptCheckpoint, Problem
from loraf.manifest import Manifest
from loraf.matrices import projection
from loraf.system import in_threads
from loraf.task_file import RESTORE


def read_manifest(path: Path, tasks: Sequence[str] | None) -> tuple[Manifest, list[Problem], bool]:
    """Reads the manifest in the folder `path`, restricted to some tasks (None: all).

    Returns:
        The manifest, the problems with its digests, and whether tasks were left out.

    Raises:
        CheckpointError, CorruptCheckpoint: see `manifest.read`; or this release cannot generate A.
        UnknownTask: a selected task does not exist.
    """
    manifest = manifests.read(path)
    all_names = manifest.task_names
    if tasks is not None:
        manifest = manifest.only(tuple(tasks))
    where = str(path / manifests.FILE_NAME)
    if manifest.projection.generator != projection.GENERATOR:
        message = f"{manifest.projection.generator!r} is unknown (this release knows {projection.GENERATOR!r})"
        remedy = "use a release of loraf that knows it"
        raise CheckpointError(Problem(message, "projection.generator", where, remedy))
    problems = []
    module_digests = {name: module.projection_sha256 for name, module in manifest.modules.items()}
    if projection.combined_digest(module_digests) != manifest.projection.sha256:
        message = "is not the digest of the modules' own digests"
        problems.append(Problem(message, "projection.sha256", where, RESTORE))
    return manifest, problems, manifest.task_names != all_names


class CheckpointManifestView:
    """A checkpoint whose manifest has been read, and the A that it determines.

    Attributes:
        path: the checkpoint's folder.
        manifest: restricted to the selected tasks.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest

    def projection_of(self, module: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns A of one module, (rank, d_in): rebuilt in float32, checked against its digest, rounded to `dtype`.

        Raises:
            CorruptCheckpoint: the seed, generator or shape is not the one that the digest was computed with.
        """
        return self.projections([module], dtype)[module]

    def projections(
        self, modules: Iterable[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Returns `projection_of` several modules (all by default), using all processors. Raises CorruptCheckpoint."""
        names = list(self.manifest.modules if modules is None else modules)
        results = in_threads(
            lambda name: projection.projection_and_digest(*self._projection_arguments(name), dtype), names
        )
        self._require_digests({name: digest for name, (_, digest) in zip(names, results, strict=True)})
        return {name: a for name, (a, _) in zip(names, results, strict=True)}

    def verify_projection(self) -> None:
        """Checks A of every module against its digest. Raises CorruptCheckpoint.

        An A whose digest this process has computed before, for any checkpoint, is not computed again.
        """
        names = list(self.manifest.modules)
        digests = in_threads(lambda name: projection.digest_of(*self._projection_arguments(name)), names)
        self._require_digests(dict(zip(names, digests, strict=True)))

    def _projection_arguments(self, module: str) -> tuple[int, str, int, int, float | None]:
        p = self.manifest.projection
        return p.seed, module, self.manifest.rank, self.manifest.modules[module].d_in, p.init_std

    def _require_digests(self, digests: Mapping[str, str]) -> None:
        modules = self.manifest.modules
        message = "A rebuilt from the seed is not the A that the tasks were trained with"
        remedy = f"seed, standard deviation, rank or shape was changed: {RESTORE}"
        problems = [
            Problem(message, f"modules.{module}.projection_sha256", str(self.path / manifests.FILE_NAME), remedy)
            for module, digest in digests.items()
            if digest != modules[module].projection_sha256
        ]
        if problems:
            raise CorruptCheckpoint(problems)
