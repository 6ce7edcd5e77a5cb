"""Says whether MuJoCo can render off-screen here; installs Mesa's EGL with apt where that is allowed."""

import os
import shutil
import subprocess
import sys

PACKAGES = ("libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libopengl0")
# In a process of its own: a GL library is loaded once, so a second attempt needs a fresh one.
RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), "the frame is black"
"""


def rendering_error() -> str | None:
    """None when a frame was rendered, else the last line that the attempt printed."""
    gl = {"MUJOCO_GL": "egl"} if sys.platform == "linux" else {}
    attempt = subprocess.run([sys.executable, "-c", RENDER], env=gl | dict(os.environ), capture_output=True, text=True)
    if attempt.returncode == 0:
        return None
    return (attempt.stderr.strip().splitlines() or [f"exit status {attempt.returncode}"])[-1]


def root_prefix() -> list[str] | None:
    """What to put before a command to run it as root without being asked anything; None when that is not possible."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo", "-n"]
    return None


def install() -> bool:
    """Install Mesa's EGL with apt; False when there is no apt, no right to use it, or it failed."""
    prefix = root_prefix()
    if not shutil.which("apt-get") or prefix is None:
        return False
    print(f"Installing {' '.join(PACKAGES)} with apt-get")
    update = [*prefix, "apt-get", "update", "-qq"]
    install = [*prefix, "apt-get", "install", "-qq", "--yes", "--no-install-recommends", *PACKAGES]
    return subprocess.run(update).returncode == 0 and subprocess.run(install).returncode == 0


def main() -> int:
    error = rendering_error()
    if error and sys.platform == "linux" and install():
        error = rendering_error()
    if error is None:
        return 0
    print(f"MuJoCo cannot render off-screen: {error}", file=sys.stderr)
    if sys.platform == "linux":
        print(
            "Install Mesa's EGL. Debian, Ubuntu:  sudo apt-get install " + " ".join(PACKAGES) + "\n"
            "                    Fedora:          sudo dnf install mesa-libEGL mesa-dri-drivers libglvnd-opengl\n"
            "then run make again.",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
