# Sourced by the other scripts: makes .venv in the repository's root and installs what the named requirements file pins,
# once; again when the file has changed. Sets VENV and changes to the root. No output when there is nothing to do.

setup() {
  local requirements=$1 stamp
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  VENV="$PWD/.venv"
  stamp="$VENV/.installed-$requirements"
  if cmp -s <(cat requirements.txt "$requirements") "$stamp"; then
    return
  fi
  echo "Installing $requirements into .venv (once; some minutes) ..." >&2
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  # torch first and alone: the exact version decides the build; a range met later would bring another one.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2
  cat requirements.txt "$requirements" > "$stamp"
}
