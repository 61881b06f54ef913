# To be sourced by bash in the top folder of a tree, from the folder that kit.sh made: `. KIT/setup.sh`. `python3`, and processes
# that it starts, then run the tree's sources. All lies under build/gpu-kit, but for the compiled module among the sources.
_unpacked=$PWD/build/gpu-kit
python3 "$(dirname "${BASH_SOURCE[0]}")/unpack.py" "$_unpacked" &&
  export PYTHONPATH=$PWD/src:$_unpacked/packages${PYTHONPATH:+:$PYTHONPATH} PATH=$_unpacked/bin:$PATH &&
  export LLAMACLUST_HOME=$_unpacked/home LLAMACLUST_STATE_DIR=$_unpacked/state
