"""A GPU for Triton to compile for, where there is none. As a program, worker.engine.kernels.building for this GPU."""

import sys
from typing import Any

from triton.runtime import driver

from tests.engine.ahead_of_time import HOPPER
from worker.engine.kernels import building


class PretendedDriver:
    """What Triton asks of a driver to compile, and nothing to run it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return HOPPER

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        pass


if __name__ == "__main__":
    driver.set_active(PretendedDriver())
    sys.exit(building.main())
