# Sourced by the other scripts. `setup REQUIREMENTS` makes .venv in the repository's root, installs the pinned packages
# and then t2v itself, in editable mode; again when one of the files has changed. Sets ROOT and VENV. It prints nothing
# if there is nothing to do.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$ROOT/.venv"

setup() {
  local requirements="$ROOT/$1" stamp="$VENV/.installed-$1"
  if cmp -s <(cat "$ROOT/requirements.txt" "$requirements" "$ROOT/pyproject.toml") "$stamp"; then
    return
  fi
  echo "Installing $1 into .venv (once; takes some minutes) ..." >&2
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  # torch first and alone, because the exact version decides the build; a range met later would bring another one.
  "${pip[@]}" "$(grep '^torch==' "$ROOT/requirements.txt")" >&2
  "${pip[@]}" -r "$requirements" >&2
  "${pip[@]}" --no-deps -e "$ROOT" >&2
  cat "$ROOT/requirements.txt" "$requirements" "$ROOT/pyproject.toml" > "$stamp"
}
