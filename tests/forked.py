"Python programs in forks of a process that has imported torch and fastai already: hundreds of programs need not import them each"
import atexit
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# of other projects alone: fastsmile itself is imported by each program
IMPORTED = ['torch', 'timm', 'fastai.vision.all', 'pandas', 'sklearn.ensemble', 'matplotlib.figure']


def _main(program: list[str], files: Path, cwd: str, env: dict[str, str]):
    "In the fork: what `python -m fastsmile ARGS`, `python -c CODE ARGS` or `python SCRIPT ARGS` does"
    for n, name in enumerate(('stdin', 'stdout', 'stderr')):
        fd = os.open(files/name, os.O_WRONLY | os.O_CREAT if n else os.O_RDONLY)
        os.dup2(fd, n)
        os.close(fd)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has put another in its place
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as they do elsewhere
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = program
    try:
        if program[0] == '-m':
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name='__main__', alter_sys=True)
        elif program[0] == '-c':
            sys.argv = ['-c', *program[2:]]
            exec(compile(program[1], '<code>', 'exec'), dict(__name__='__main__'))
        else:
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name='__main__')
    finally: atexit._run_exitfuncs()  # multiprocessing does not


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context


def run_python(program: list, cwd=None, env=None, stdin: str = '', timeout: float = 600) -> subprocess.CompletedProcess:
    "Exit code and output of a program: `-m` and a module, `-c` and code, or a script, and its arguments"
    program = list(map(str, program))
    with tempfile.TemporaryDirectory() as tmp:
        files = Path(tmp)
        (files/'stdin').write_text(stdin)
        process = _server().Process(target=_main, args=(program, files, str(cwd or os.getcwd()), dict(env or os.environ)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(program, timeout)
        said = [(files/name).read_text(errors='replace') for name in ('stdout', 'stderr')]
    return subprocess.CompletedProcess(program, process.exitcode, *said)
