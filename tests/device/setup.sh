#!/usr/bin/env bash
# Makes the sources importable as the package where it cannot be installed; source it from the repository's root.
site=$(mktemp -d)
mkdir "$site/farrier"
for file in public/*; do ln -s "$PWD/$file" "$site/farrier/"; done
for room in agent runtime targets plugins; do ln -s "$PWD/$room" "$site/farrier/$room"; done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
