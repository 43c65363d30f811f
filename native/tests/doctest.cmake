# doctest's one header: the system's (Debian and Ubuntu: doctest-dev), or else Debian's package, fetched into the build
# folder without being installed. Sets DOCTEST_INCLUDE_DIR.
find_path(DOCTEST_INCLUDE_DIR doctest/doctest.h)
if(NOT DOCTEST_INCLUDE_DIR)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/doctest-dev)
  set(package ${folder}/doctest-dev.deb)
  set(status_of_all "")
  # The mirror forgets versions that no release has any more; the archive of snapshots does not.
  foreach(url IN ITEMS
      http://deb.debian.org/debian/pool/main/d/doctest/doctest-dev_2.4.9~ds-1_all.deb
      http://snapshot.debian.org/archive/debian/20230301T000000Z/pool/main/d/doctest/doctest-dev_2.4.9~ds-1_all.deb)
    file(DOWNLOAD ${url} ${package} STATUS status TIMEOUT 60)
    list(GET status 0 failed)
    if(NOT failed)
      file(SHA256 ${package} sha256)
      if(sha256 STREQUAL b1b43598b8e7f347af1c00f2263f0a19af4c632c808a6fc78a0617eb494c2c94)
        break()
      endif()
      set(status "the file is not the one expected")
    endif()
    string(APPEND status_of_all "\n  ${url}: ${status}")
    file(REMOVE ${package})
  endforeach()
  if(NOT EXISTS ${package})
    message(FATAL_ERROR "The tests of the native kernels need doctest/doctest.h, which is neither on this system nor to "
                        "be had: install doctest (Debian, Ubuntu: apt-get install doctest-dev), or pass "
                        "-D DOCTEST_INCLUDE_DIR=<folder that holds doctest/doctest.h>. Tried:${status_of_all}")
  endif()
  # A Debian package is an archive of two archives, and CMake reads both kinds.
  file(ARCHIVE_EXTRACT INPUT ${package} DESTINATION ${folder})
  file(ARCHIVE_EXTRACT INPUT ${folder}/data.tar.xz DESTINATION ${folder})
  set(DOCTEST_INCLUDE_DIR ${folder}/usr/include CACHE PATH "folder that holds doctest/doctest.h" FORCE)
endif()
message(STATUS "doctest: ${DOCTEST_INCLUDE_DIR}")
