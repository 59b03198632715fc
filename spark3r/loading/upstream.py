"""The models' own packages: how to install them, their licences, how to build the models.

No part of them belongs to spark3r, and none is imported before its model is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FamilyError, WeightsError
from . import mapanything, worldmirror

_GIT_TIMEOUT_S = 5

NON_COMMERCIAL = "CC BY-NC 4.0, non-commercial"


@dataclass(frozen=True)
class InstalledCode:
    """The code of an architecture, as it is installed here.

    Attributes:
        package: Name of the package.
        version: Its version; None if it was not installed as a package.
        commit: Commit of its repository, if that is known; it ends in ``-dirty`` if files of a
            clone were changed.
    """

    package: str
    version: str | None = None
    commit: str | None = None


def installed_code(package: str, module: str, repository: str) -> InstalledCode:
    """Return the version and the commit of installed code, as far as they are known.

    pip records the commit of an installation from git. The commit of a clone that Python imports
    from is asked of git.

    Args:
        package: Name of the package.
        module: Name of the module at its top.
        repository: Name of its repository, without the owner.
    """
    version: str | None = None
    commit: str | None = None
    try:
        distribution = metadata.distribution(package)
        version = distribution.version
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, OSError, ValueError, AttributeError):
        pass  # it was not installed as a package, or pip's record is damaged
    return InstalledCode(package, version, commit or _commit_of_clone(module, repository))


def _commit_of_clone(module: str, repository: str) -> str | None:
    """Return the commit of the clone that a module is imported from, None if it is in none."""
    found = _spec(module)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        clone = Path(folder).parent
        # A copy inside of a user's own repository is of no commit of that repository.
        url = _git(clone, "config", "--get", "remote.origin.url") if _is_clone(clone) else ""
        if url.removesuffix(".git").rpartition("/")[2] == repository:
            return _git(clone, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def _spec(module: str) -> ModuleSpec | None:
    try:
        return find_spec(module)
    except ValueError:  # a module that was made by hand has none
        return None


def _is_clone(folder: Path) -> bool:
    return (folder / ".git").exists()


def _git(folder: Path, *arguments: str) -> str:
    """Return the answer of git about a clone, "" if it has none."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


@dataclass(frozen=True)
class Upstream:
    """One architecture's own code and weights.

    Attributes:
        family: Name of the family, as in ``family:WEIGHTS``.
        title: Usual name of the model.
        package: Name of the package that holds its code.
        install: Shell command that installs its code, as it was checked.
        licence: Licence of the code.
        weights_licence: Function from the repository of published weights to their licence, "" if
            it is not known.
        example: Name of weights, for messages.
        example_gb: Size of these weights in float32, in GB (10⁹ bytes).
        variants: Architectures that can be built; the first is the default.
        variant_of: Function from a checkpoint's tensors to their variant, None if they fit none.
        entry: A module of the code that all variants need.
        build: Function that builds a variant with random weights; it is given the variant and the
            function that imports modules of the code.
        unused: Prefixes of a checkpoint's tensors for parts that are not built.
        untold: Variant of published weights whose name tells none. None asks for it.
    """

    family: str
    title: str
    package: str
    install: str
    licence: str
    weights_licence: Callable[[str], str]
    example: str
    example_gb: float
    variants: tuple[str, ...]
    variant_of: Callable[[Mapping[str, Tensor]], str | None]
    entry: str
    build: Callable[[str, Callable[[str], Any]], nn.Module]
    unused: tuple[str, ...] = ()
    untold: str | None = None

    def random(self, variant: str) -> nn.Module:
        """Build a variant with random weights, the same every time.

        Raises:
            FamilyError: If the code is not installed, or cannot be imported or built.
        """
        state = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            self.require()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the model's code: a user cannot act on them
                return self.build(variant, self.module)
        except FamilyError:
            raise
        except Exception as error:
            raise FamilyError(
                f"building {self.title} raised {type(error).__name__}: {error}; its code may be of "
                f"another version than spark3r knows. Install it with: {self.install}"
            ) from error
        finally:
            torch.set_rng_state(state)

    @property
    def example_licence(self) -> str:
        """Licence of the weights `example`."""
        return self.weights_licence("/".join(self.example.split("/")[:2]))

    @property
    def checked(self) -> str:
        """Commit, or version, of the code that spark3r was checked against."""
        commit = re.search(r"\b[0-9a-f]{40}\b", self.install)
        if commit is not None:
            return commit[0]
        return next(word for word in self.install.split() if "==" in word).partition("==")[2]

    @property
    def installed(self) -> InstalledCode | None:
        """The code as it is installed, without importing it; None if it is not found."""
        module = self.entry.partition(".")[0]
        if _spec(module) is None:
            return None
        repository = re.search(r"github\.com/[^/]+/([\w.-]+)", self.install)
        return installed_code(self.package, module, repository[1] if repository else "")

    def require(self) -> None:
        """Import the code, before weights of several GB are fetched for it.

        Raises:
            FamilyError: If the code, or a package that it needs, is missing.
        """
        os.environ.setdefault("DA3_LOG_LEVEL", "WARN")  # it prints every pass to stdout
        if not torch.cuda.is_available():
            os.environ.setdefault("XFORMERS_DISABLED", "1")  # π³ would use GPU kernels
        self.module(self.entry)

    def module(self, name: str) -> Any:
        """Import a module of the code, and print its output to stderr.

        Raises:
            FamilyError: If the code, or a package that it needs, is missing.
        """
        try:
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(name)
        except ImportError as error:
            package = name.partition(".")[0]
            missing = (error.name or package).partition(".")[0]
            what = "is not installed" if missing == package else f"needs '{missing}'"
            raise FamilyError(
                f"the code of {self.title} {what} ({error}). Install it with: {self.install} "
                f"(licence of the code: {self.licence}; weights {self.example}: "
                f"{self.example_licence})"
            ) from error


def _build_vggt(variant: str, module: Callable[[str], Any]) -> nn.Module:
    # A prediction has no tracks of query points, so their head is left out.
    return module("vggt.models.vggt").VGGT(enable_track=False)


def _vggt_weights(repository: str) -> str:
    return {
        "facebook/VGGT-1B": "non-commercial",
        "robbyant/lingbot-map": "Apache-2.0, as its code",
        "facebook/VGGT-1B-Commercial": "commercial use allowed under the VGGT License, gated",
    }.get(repository, "")


def _vggt_variant(tensors: Mapping[str, Tensor]) -> str | None:
    return "1b" if "aggregator.global_blocks.0.attn.qkv.weight" in tensors else None


def _build_pi3(variant: str, module: Callable[[str], Any]) -> nn.Module:
    if variant == "pi3x":
        return module("pi3.models.pi3x").Pi3X()
    return module("pi3.models.pi3").Pi3()


def _pi3_variant(tensors: Mapping[str, Tensor]) -> str | None:
    if "decoder.0.attn.qkv.weight" not in tensors or "register_token" not in tensors:
        return None
    return "pi3x" if "metric_token" in tensors else "pi3"


_DA3_WIDTHS = {384: "small", 768: "base", 1024: "large", 1536: "giant"}


def _build_da3(variant: str, module: Callable[[str], Any]) -> nn.Module:
    name = "da3nested-giant-large" if variant == "nested" else f"da3-{variant}"
    config = module("depth_anything_3.cfg")
    found = config.load_config(module("depth_anything_3.registry").MODEL_REGISTRY[name])
    for part in (found, found.get("anyview") or {}):  # a prediction has no Gaussian splats
        part.pop("gs_head", None)
        part.pop("gs_adapter", None)
    return config.create_object(found)


def _da3_weights(repository: str) -> str:
    owner, _, name = repository.partition("/")
    if owner != "depth-anything":
        return ""
    upper = name.upper()
    free = any(size in upper for size in ("DA3-SMALL", "DA3-BASE", "DA3METRIC", "DA3MONO"))
    return "Apache-2.0" if free else NON_COMMERCIAL


def _da3_variant(tensors: Mapping[str, Tensor]) -> str | None:
    if "da3.backbone.pretrained.cls_token" in tensors:
        return "nested"
    token = tensors.get("backbone.pretrained.cls_token")
    if token is None:
        return None
    if not any(name.startswith("cam_dec.") for name in tensors):
        raise WeightsError(
            "it is a metric or monocular Depth-Anything-3, which takes every frame by itself: it "
            "has no global attention to reduce"
        )
    return _DA3_WIDTHS.get(token.shape[-1])


def _build_omega(variant: str, module: Callable[[str], Any]) -> nn.Module:
    model = module("vggt_omega.models.vggt_omega").VGGTOmega()
    # The constructor leaves these uninitialised or NaN.
    for part in model.modules():
        if hasattr(part, "gamma") and hasattr(part, "init_values"):
            nn.init.constant_(part.gamma, float(part.init_values))
    for name, mask in model.named_buffers():
        if name.endswith("bias_mask"):
            mask.fill_(1.0).view(3, -1)[1] = 0.0
    return model


def _omega_variant(tensors: Mapping[str, Tensor]) -> str | None:
    return "1b" if "aggregator.inter_frame_blocks.0.attn.qkv.weight" in tensors else None


def _mapanything_weights(repository: str) -> str:
    owner, _, name = repository.partition("/")
    if owner != "facebook" or not name.startswith("map-anything"):
        return ""
    return "Apache-2.0" if "apache" in name else NON_COMMERCIAL


_TENCENT = "Tencent HY-WORLD 2.0 Community License: not in the EU, the UK and South Korea"


def _worldmirror_weights(repository: str) -> str:
    return {
        "tencent/HY-World-2.0": _TENCENT,
        "tencent/HunyuanWorld-Mirror": _TENCENT.replace("HY-WORLD 2.0", "HunyuanWorld-Mirror"),
    }.get(repository, "")


def _build_panovggt(variant: str, module: Callable[[str], Any]) -> nn.Module:
    aggregator = module("panovggt.models.aggregator").Aggregator
    own = aggregator._try_load_dinov2
    aggregator._try_load_dinov2 = lambda *_: None  # it would fetch weights that a checkpoint has
    try:
        made: nn.Module = module("panovggt.models.panovggt_model").PanoVGGTModel(
            enable_global_points=False  # a prediction has none
        )
    finally:
        aggregator._try_load_dinov2 = own
    return made


def _panovggt_variant(tensors: Mapping[str, Tensor]) -> str | None:
    needed = ("aggregator.decoder.0.attn.qkv.weight", "aggregator.alpha_pos")
    return "panovggt" if all(name in tensors for name in needed) else None


UPSTREAMS: dict[str, Upstream] = {
    upstream.family: upstream
    for upstream in (
        Upstream(
            family="vggt",
            title="VGGT",
            package="vggt",
            install="pip install git+https://github.com/facebookresearch/vggt"
            "@44b3afbd1869d8bde4894dd8ea1e293112dd5eba",
            licence="VGGT License v1, commercial use allowed, its policy excludes military use",
            weights_licence=_vggt_weights,
            example="facebook/VGGT-1B",
            example_gb=5.0,
            variants=("1b",),
            variant_of=_vggt_variant,
            entry="vggt.models.vggt",
            build=_build_vggt,
            unused=("track_head.",),
        ),
        Upstream(
            family="pi3",
            title="π³",
            package="pi3",
            install="pip install huggingface_hub git+https://github.com/yyfz/Pi3"
            "@9fa3ddb3f8d53041f8b2738df404f62223bbaa7b",
            licence="BSD-3-Clause, its pos_embed.py CC BY-NC-SA 4.0, non-commercial",
            weights_licence=lambda repository: (
                NON_COMMERCIAL if repository.startswith("yyfz233/") else ""
            ),
            example="yyfz233/Pi3",
            example_gb=3.8,
            variants=("pi3", "pi3x"),
            variant_of=_pi3_variant,
            entry="pi3.models.pi3",
            build=_build_pi3,
        ),
        Upstream(
            family="da3",
            title="Depth-Anything-3",
            package="depth-anything-3",
            install="pip install --no-deps depth-anything-3==0.1.1 addict omegaconf einops PyYAML",
            licence="Apache-2.0",
            weights_licence=_da3_weights,
            example="depth-anything/DA3-LARGE-1.1",
            example_gb=1.6,
            variants=("small", "base", "large", "giant", "nested"),
            variant_of=_da3_variant,
            entry="depth_anything_3.model.da3",
            build=_build_da3,
            unused=("gs_head.", "gs_adapter.", "da3.gs_head.", "da3.gs_adapter."),
        ),
        Upstream(
            family="omega",
            title="VGGT-Ω",
            package="vggt-omega",
            install="pip install git+https://github.com/facebookresearch/vggt-omega"
            "@39a0cb8af88554f15ddcb5354cd52bde588fa014",
            licence="FAIR Noncommercial Research License",
            weights_licence=lambda repository: (
                "FAIR Noncommercial Research License, gated"
                if repository == "facebook/VGGT-Omega"
                else ""
            ),
            example="facebook/VGGT-Omega/vggt_omega_1b_512.pt",
            example_gb=4.6,
            variants=("1b",),
            variant_of=_omega_variant,
            entry="vggt_omega.models.vggt_omega",
            build=_build_omega,
            unused=("text_alignment_head.",),
        ),
        Upstream(
            family="mapanything",
            title="MapAnything",
            package="mapanything",
            install="pip install git+https://github.com/facebookresearch/map-anything"
            "@f7ebafb4d8349776705aaa686cf928988d1bd7f4",
            licence="Apache-2.0",
            weights_licence=_mapanything_weights,
            example="facebook/map-anything-apache",
            example_gb=4.9,
            variants=tuple(mapanything.VARIANTS),
            variant_of=mapanything.variant,
            entry="mapanything.models.mapanything",
            build=mapanything.build,
            untold="v1.1",
        ),
        Upstream(
            family="worldmirror",
            title="WorldMirror",
            package="hyworld2",
            install="pip install einops huggingface_hub; "
            "git clone https://github.com/Tencent-Hunyuan/HY-World-2.0; "
            "git -C HY-World-2.0 checkout 05d3035d0b967fc5c249f8956c7dc337e9e6ea94; "
            "export PYTHONPATH=$PWD/HY-World-2.0:$PYTHONPATH",
            licence=_TENCENT,
            weights_licence=_worldmirror_weights,
            example="tencent/HY-World-2.0/HY-WorldMirror-2.0/model.safetensors",
            example_gb=5.0,
            variants=worldmirror.VARIANTS,
            variant_of=worldmirror.variant,
            entry=f"{worldmirror.PACKAGE}.models.utils.grid",
            build=worldmirror.build,
            unused=("pts_head.", "norm_head.", "gs_head.", "gs_renderer."),
            untold="1",
        ),
        Upstream(
            family="panovggt",
            title="PanoVGGT",
            package="panovggt",
            install="pip install huggingface_hub requests; "
            "git clone https://github.com/YijingGuo-June/PanoVGGT; "
            "git -C PanoVGGT checkout 556bb7d2ec2d02bd3ee4ed535542e74290ba22cf; "
            "export PYTHONPATH=$PWD/PanoVGGT:$PYTHONPATH",
            licence="MIT, its pos_embed.py CC BY-NC-SA 4.0, non-commercial",
            weights_licence=lambda repository: "",
            example="YijingGuo/PanoVGGT/model.pt",
            example_gb=4.0,
            variants=("panovggt",),
            variant_of=_panovggt_variant,
            entry="panovggt.models.aggregator",
            build=_build_panovggt,
            unused=("global_points_decoder.", "global_point_head.", "pos_adapters.global."),
        ),
    )
}
