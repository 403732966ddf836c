"""What runs inside a sandbox: takes Python code over a pipe, runs it, and says how it ended. Standard library only.

Never imported by the rest: rl/sandbox.py hands its text to the sandbox's own Python. It does what it is told until the
pipe ends. Nothing that it says can be trusted, since the code that it runs can say it as well.
"""

import ast
import contextlib
import errno
import json
import linecache
import os
import resource
import sys
import traceback

LIMITS_BY_ERRNO = {
    errno.EMFILE: "open_files",
    errno.ENOSPC: "file_size",
    errno.EFBIG: "file_size",
    errno.EAGAIN: "processes",
    errno.ENOMEM: "memory",
}


def limit_of(error):
    """Which limit an error that ended the code comes from, if any."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        return LIMITS_BY_ERRNO.get(error.errno or 0)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    return None


def show(error, name):
    """The traceback, from the code's own first frame on."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_code.co_filename != name:
        where = where.tb_next
    traceback.print_exception(type(error), error, where)


def run(code, name, echo, variables):
    """(exit status, limit)"""
    linecache.cache[name] = len(code), None, code.splitlines(True), name
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if echo and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)
        if last is not None:
            sys.displayhook(eval(compile(ast.Expression(last.value), name, "eval"), variables))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return (end.code if isinstance(end.code, int) else int(end.code is not None)), None
    except BaseException as error:
        show(error, name)
        return 1, limit_of(error)
    return 0, None


def main():
    commands, answers, limits = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    for which, value in limits.items():
        resource.setrlimit(getattr(resource, which), (value, value))
    for descriptor in (commands, answers):
        os.set_inheritable(descriptor, False)
    variables = {"__name__": "__main__", "__builtins__": __builtins__}
    calls, own = 0, os.getpid()
    with open(commands, encoding="utf-8", errors="surrogatepass") as lines:
        for line in lines:
            told = json.loads(line)
            calls += 1
            status, limit = run(told["code"], f"<code {calls}>", told["echo"], variables)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            if os.getpid() != own:  # a child that the code has forked
                os._exit(status)
            os.write(answers, json.dumps({"exit": status, "limit": limit}).encode() + b"\n")


main()
