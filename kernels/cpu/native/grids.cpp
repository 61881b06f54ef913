#include "grid_points.h"
