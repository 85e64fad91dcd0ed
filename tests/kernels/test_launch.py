"""Launches of fused kernels: compiled at the first call, looked up at later ones."""

from __future__ import annotations

from types import SimpleNamespace

from hybridlib.kernels.fused import launch


def test_a_kernel_is_compiled_once_for_each_key():
    launches = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launches.append(("compiled", grid, arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launches.append((options, grid, arguments)) or Compiled()

    kernel, use, first = Kernel(), launch.Launch(1, 2), ({"num_warps": 1, "num_stages": 2}, (3, 4, 1), (65, 16))
    for key in ("one", "one", "another", None, None):
        launch.Place.launch(SimpleNamespace(key=key), kernel, use, (3, 4, 1), 65, 16)
    assert launches == [first, ("compiled", (3, 4, 1), (65, 16)), first, first, first]
