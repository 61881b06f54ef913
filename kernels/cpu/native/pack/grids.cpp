#include "pack/grid_points.h"
