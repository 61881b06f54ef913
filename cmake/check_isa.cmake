# Usage: cmake -DNM=nm -DREADELF=readelf -DLEVEL=avx2 "-DOBJECTS=a.o|b.o" -P check_isa.cmake
# Checks that code for a feature level cannot run on a CPU without it. Fails if an object of the level
# - defines a weak symbol: the linker keeps one of several copies, and one for AVX-512 crashes other CPUs;
# - exports a name outside the level's namespace;
# - runs code when the module is loaded, before a level is chosen (static initializers, IFUNC resolvers).
set(failures "")
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")

# Sets `output` to the lines that the command ARGN prints for `object`.
function(read_lines output)
  execute_process(COMMAND ${ARGN} ${object} OUTPUT_VARIABLE text RESULT_VARIABLE status ERROR_VARIABLE problem)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGN} ${object}: ${problem}")
  endif()
  # Brackets and semicolons would join or split elements of a CMake list.
  string(REGEX REPLACE "[];[]" "," text "${text}")
  string(REPLACE "\n" ";" text "${text}")
  set(${output} "${text}" PARENT_SCOPE)
endfunction()

foreach(object IN LISTS OBJECTS)
  read_lines(symbols ${NM} --defined-only -C)
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES "^[0-9a-f]+ [WVu] (.*)$")
      list(APPEND failures "weak symbol: ${CMAKE_MATCH_1}")
    elseif(symbol MATCHES "^[0-9a-f]+ i (.*)$")
      list(APPEND failures "resolved when the module is loaded: ${CMAKE_MATCH_1}")
    elseif(symbol MATCHES "^[0-9a-f]+ [TDBRGSC] " AND NOT symbol MATCHES "llamaclust::${LEVEL}::")
      list(APPEND failures "external symbol: ${symbol}")
    endif()
  endforeach()
  read_lines(sections ${READELF} -SW)
  foreach(section IN LISTS sections)
    if(section MATCHES " (\\.(preinit_array|init_array|fini_array|ctors|dtors)[.0-9]*) ")
      list(APPEND failures "static initializer: section ${CMAKE_MATCH_1} of ${object}")
    endif()
  endforeach()
endforeach()
if(failures)
  list(REMOVE_DUPLICATES failures)
  list(JOIN failures "\n  " lines)
  message(FATAL_ERROR "objects of feature level ${LEVEL} define what could run on a CPU without it:\n  ${lines}")
endif()
