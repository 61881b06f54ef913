# Builds the arithmetic as object libraries, for the Python module and for tests/kernels/native. The sources in level/
# are compiled once per CPU feature level, each time into the namespace of that level; all other sources are compiled
# once for any CPU. Sets `objects`, which the caller links, and `checks`, the commands for its POST_BUILD step.
# `check_isa`, set by the caller, is the path of the script that those commands run.
set(native ${CMAKE_CURRENT_LIST_DIR})
file(GLOB bindings CONFIGURE_DEPENDS ${native}/bindings/*.cpp)
file(GLOB baseline CONFIGURE_DEPENDS ${native}/executor/*.cpp ${native}/frames/*.cpp ${native}/pack/*.cpp ${native}/probes/*.cpp
     ${native}/runtime/*.cpp ${native}/sampler/*.cpp)
file(GLOB_RECURSE level_sources CONFIGURE_DEPENDS ${native}/level/*.cpp)

# The slowest level comes first, because a process takes the last available one. amx has not been run on real hardware,
# so it stands before avx512vbmi, which is chosen instead.
set(levels generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND levels avx2 avxvnni avx512 avx512vnni amx avx512vbmi)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  list(APPEND levels neon neon_dotprod neon_i8mm)
endif()
set(LLAMACLUST_LEVELS "${levels}" CACHE STRING "the feature levels to build, slowest first")

set(flags_generic "")
set(flags_avx2 -mavx2 -mfma -mf16c)
set(flags_avxvnni ${flags_avx2} -mavxvnni)
set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(flags_avx512vnni ${flags_avx512} -mavx512vnni)
set(flags_avx512vbmi ${flags_avx512vnni} -mavx512vbmi)
set(flags_amx ${flags_avx512vbmi} -DLLAMACLUST_TILES)
set(flags_neon -DLLAMACLUST_NEON)
set(flags_neon_dotprod ${flags_neon} -march=armv8.2-a+dotprod)
set(flags_neon_i8mm ${flags_neon} -march=armv8.2-a+dotprod+i8mm)

# A level with a base differs from it only in integer dot products and byte look-ups, which matmul/ and attention/
# contain. All other code is shared with the base, if the base is also built.
set(base_avxvnni avx2)
set(base_avx512vnni avx512)
set(base_avx512vbmi avx512)
set(base_neon_dotprod neon)
set(base_neon_i8mm neon)
set(base_amx avx512)
set(dot_sources ${level_sources})
list(FILTER dot_sources INCLUDE REGEX "/level/(matmul|attention)/")

# Byte look-ups are only in matmul/, so attention is shared with the level that has the same dot products, if that level
# is built.
set(attention_of_avx512vbmi avx512vnni)
set(attention_of_amx avx512vnni)
set(attention_source ${native}/level/attention/attention.cpp)

# Some levels add only the panel loops of matrix products (level/matmul/panels_only.cpp). All their other code is shared
# with two other levels.
set(panels_over_neon_i8mm neon_dotprod)
set(panels_over_amx avx512vbmi)
set(panels_only ${native}/level/matmul/panels_only.cpp)
list(REMOVE_ITEM level_sources ${panels_only})
list(REMOVE_ITEM dot_sources ${panels_only})
set(panel_sources ${level_sources} ${panels_only})
list(FILTER panel_sources INCLUDE REGEX "/level/matmul/(.*_types|panels_only)[.]cpp$")

# -ffp-contract=off: the compiler never fuses a multiplication with an addition, so every level rounds where the source
# says so.
# -Wno-uninitialized: g++ 12 reports values in its own AVX-512 headers as uninitialized.
set(LLAMACLUST_OPTIMIZATION -O3 CACHE STRING "-O1 is quicker to compile and slower to run, and gives the same bits")
# The lanes of the generic level are loops. For these, g++ with -O3 takes twice the time and makes slower code
# (measured: 4 to 40 %).
if(LLAMACLUST_OPTIMIZATION STREQUAL "-O3" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(flags_generic -O2 -ftree-vectorize -fvect-cost-model=dynamic)
endif()
option(LLAMACLUST_FOR_THIS_CPU "do not optimize the feature levels that this CPU cannot run: built in two thirds of the time" OFF)
set(needs_avxvnni avx_vnni)
set(needs_avx512 avx512dq)
set(needs_avx512vnni avx512_vnni)
set(needs_avx512vbmi avx512vbmi)
set(needs_amx amx_int8)
set(cpu_flags "")
if(LLAMACLUST_FOR_THIS_CPU)
  file(STRINGS /proc/cpuinfo cpu_flags REGEX "^flags" LIMIT_COUNT 1)
endif()
set(arithmetic_flags ${LLAMACLUST_OPTIMIZATION} -ffp-contract=off -Wall -Wextra $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)

add_library(cpu_baseline OBJECT ${baseline})
target_compile_options(cpu_baseline PRIVATE ${arithmetic_flags})
target_include_directories(cpu_baseline PRIVATE ${native})
# Without this option, g++ does not vectorize a selection between two floats. Floating-point traps are disabled anyway.
set_source_files_properties(${native}/runtime/dtype_cast.cpp PROPERTIES COMPILE_OPTIONS "-fno-trapping-math")
# With this optimization, g++ 12 selected other grid points for IQ3_XXS and IQ3_S at the generic level, although no
# sanitizer reports an error there.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_source_files_properties(${native}/level/quantize/quantize.cpp PROPERTIES COMPILE_OPTIONS "-fno-ipa-modref")
endif()

set(objects $<TARGET_OBJECTS:cpu_baseline>)
set(checks "")
set(built "")
foreach(level IN LISTS LLAMACLUST_LEVELS)
  set(base ${level})
  set(over ${level})
  set(attention ${level})
  set(sources ${level_sources})
  if("${base_${level}}" IN_LIST LLAMACLUST_LEVELS)
    set(base ${base_${level}})
    set(sources ${dot_sources})
  endif()
  if("${panels_over_${level}}" IN_LIST LLAMACLUST_LEVELS AND NOT base STREQUAL level)
    set(over ${panels_over_${level}})
    set(attention ${over})
    set(sources ${panel_sources})
  endif()
  if("${attention_of_${level}}" IN_LIST LLAMACLUST_LEVELS)
    set(attention ${attention_of_${level}})
    list(REMOVE_ITEM sources ${attention_source})
  endif()
  add_library(cpu_${level} OBJECT ${sources})
  string(APPEND built " X(${level},${attention},${base})")
  target_compile_options(cpu_${level} PRIVATE ${arithmetic_flags} ${flags_${level}} -fno-exceptions -fno-rtti)
  if(cpu_flags AND DEFINED needs_${level} AND NOT "${cpu_flags} " MATCHES " ${needs_${level}} ")
    target_compile_options(cpu_${level} PRIVATE -Og)
  endif()
  target_compile_definitions(cpu_${level} PRIVATE LLAMACLUST_LEVEL=${level})
  if(NOT over STREQUAL level)
    target_compile_definitions(cpu_${level} PRIVATE LLAMACLUST_PANELS_OVER=${over})
  endif()
  target_include_directories(cpu_${level} PRIVATE ${native})
  list(APPEND objects $<TARGET_OBJECTS:cpu_${level}>)
  list(APPEND checks COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DREADELF=${CMAKE_READELF} -DLEVEL=${level}
                             "-DOBJECTS=$<JOIN:$<TARGET_OBJECTS:cpu_${level}>,|>"
                             -P ${check_isa})
endforeach()
set_source_files_properties(${native}/runtime/levels.cpp PROPERTIES COMPILE_OPTIONS "-DLLAMACLUST_LEVELS(X)=${built}")
