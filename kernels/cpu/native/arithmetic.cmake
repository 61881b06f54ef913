# The arithmetic as objects, for the Python module and for tests/kernels/native. The sources in level/ are compiled once per CPU
# feature level, each into a namespace of its own, everything else once for any CPU. Sets `objects`, what to link, and
# `checks`, commands that are to follow; `check_isa` is the script that they run.
set(native ${CMAKE_CURRENT_LIST_DIR})
file(GLOB bindings CONFIGURE_DEPENDS ${native}/bindings/*.cpp)
file(GLOB baseline CONFIGURE_DEPENDS ${native}/executor/*.cpp ${native}/frames/*.cpp ${native}/pack/*.cpp ${native}/probes/*.cpp
     ${native}/runtime/*.cpp ${native}/sampler/*.cpp)
file(GLOB_RECURSE level_sources CONFIGURE_DEPENDS ${native}/level/*.cpp)

set(levels generic)  # slowest first; amx, which has run on no machine yet, before the level that is chosen in its place
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

# What a level adds to another one are integer dot products and look-ups of bytes, in matmul/ and attention/; all else is
# the other one's code, if that is built as well.
set(base_avxvnni avx2)
set(base_avx512vnni avx512)
set(base_avx512vbmi avx512)
set(base_neon_dotprod neon)
set(base_neon_i8mm neon)
set(base_amx avx512)
set(dot_sources ${level_sources})
list(FILTER dot_sources INCLUDE REGEX "/level/(matmul|attention)/")

# Look-ups of bytes are in matmul/ alone: attention is that of the level with the same dot products, if that is built.
set(attention_of_avx512vbmi avx512vnni)
set(attention_of_amx avx512vnni)
set(attention_source ${native}/level/attention/attention.cpp)

# What such a level adds may be loops of panels alone (level/matmul/panels_only.cpp): then all else is that of two others.
set(panels_over_neon_i8mm neon_dotprod)
set(panels_over_amx avx512vbmi)
set(panels_only ${native}/level/matmul/panels_only.cpp)
list(REMOVE_ITEM level_sources ${panels_only})
list(REMOVE_ITEM dot_sources ${panels_only})
set(panel_sources ${level_sources} ${panels_only})
list(FILTER panel_sources INCLUDE REGEX "/level/matmul/(.*_types|panels_only)[.]cpp$")

# No multiplication and addition is ever joined by the compiler: every level rounds where the source says so.
# The AVX-512 headers of g++ 12 are full of values that look uninitialized to it.
set(LLAMACLUST_OPTIMIZATION -O3 CACHE STRING "-O1 is quicker to compile and slower to run, and gives the same bits")
# In the generic level, whose lanes are loops, g++ makes slower code of -O3 (4 to 40 % measured) in twice the time.
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
# Without it g++ makes no vectors of a choice between two floats; floating-point traps are off anyway.
set_source_files_properties(${native}/runtime/dtype_cast.cpp PROPERTIES COMPILE_OPTIONS "-fno-trapping-math")
# With it g++ 12 picked other points of IQ3_XXS and IQ3_S in the generic level, where no sanitizer finds fault.
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
