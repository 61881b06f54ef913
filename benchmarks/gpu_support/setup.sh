# Source this file with bash in the top folder of a tree: `. KIT/setup.sh`, where KIT is the folder that kit.sh made. Then
# `python3` and its child processes use the tree's sources. All files are under build/gpu-kit-unpacked, except the compiled
# module, which is among the sources. The exit status is not 0 if anything is missing.
_unpacked=$PWD/build/gpu-kit-unpacked
python3 "$(dirname "${BASH_SOURCE[0]}")/unpack.py" "$_unpacked" &&
  export PYTHONPATH=$PWD/src:$_unpacked/packages${PYTHONPATH:+:$PYTHONPATH} PATH=$_unpacked/bin:$PATH &&
  export LLAMACLUST_HOME=$_unpacked/home LLAMACLUST_STATE_DIR=$_unpacked/state
