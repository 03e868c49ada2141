#!/bin/sh
# Make .venv with a Python that this project supports; say what is missing in one line.
ok='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
works() { "$1" -c "$ok" >/dev/null 2>&1; }

if works .venv/bin/python; then exit 0; fi
for p in "$PYTHON" python3 python3.12 python3.11 python3.13 python; do
    if [ -n "$p" ] && works "$p"; then
        echo "setting up .venv with $("$p" --version); the first time this downloads a few GB"
        exec "$p" -m venv --clear .venv
    fi
done
echo "No Python 3.11, 3.12 or 3.13 with venv found: install one (Debian: apt install python3-venv), or name it with PYTHON=/path/to/python make ..." >&2
exit 1
