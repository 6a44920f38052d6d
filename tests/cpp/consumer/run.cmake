# Builds examples/cpp as a third party would, against the installed package, and runs a short form of it.
# Needs -DCCTORCH_BUILD_DIR -DEXAMPLE_DIR -DWORK_DIR -DGENERATOR.

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(output "${output}" PARENT_SCOPE)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}\nended with ${code}:\n${output}")
  endif()
endfunction()

function(expect_failure expected_code text)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(FIND "${output}" "${text}" position)
  if(NOT code EQUAL expected_code OR position EQUAL -1)
    message(FATAL_ERROR "${ARGN}\nended with ${code}, expected ${expected_code} and \"${text}\":\n${output}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR}/prefix ${WORK_DIR}/run ${WORK_DIR}/one ${WORK_DIR}/two)
run(${CMAKE_COMMAND} --install ${CCTORCH_BUILD_DIR} --component Unspecified --prefix ${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} -S ${EXAMPLE_DIR} -B ${WORK_DIR}/build -G ${GENERATOR} -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)

set(train_resnet ${WORK_DIR}/build/train_resnet)
run(${train_resnet} --help)
expect_failure(2 "--target 1.5: expected a number from" ${train_resnet} --target 1.5)
expect_failure(2 "--epoch: no such option" ${train_resnet} --epoch 3)
expect_failure(1 "no such file" ${train_resnet} --data ${WORK_DIR}/nothing --out ${WORK_DIR}/run)

run(${train_resnet} --synthetic --blocks 1 --epochs 4 --finetune-epochs 3 --batch 64 --device cpu --target 0.5
    --out ${WORK_DIR}/run)
message("${output}")

# Data parallel: as a process alone, up to rounding. The ranks run at once, as the commands of a pipeline do.
string(RANDOM LENGTH 4 ALPHABET 0123456789 digits)
function(on_two_ranks of_rank_0 of_rank_1)
  set(environment ${CMAKE_COMMAND} -E env OMP_NUM_THREADS=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=2${digits})
  # Rank 0 is the last, since it prints: another would not read that.
  execute_process(COMMAND ${environment} RANK=1 ${train_resnet} ${of_rank_1}
                  COMMAND ${environment} RANK=0 ${train_resnet} ${of_rank_0}
                  TIMEOUT 120 RESULTS_VARIABLE codes OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(codes "${codes}" PARENT_SCOPE)
  set(output "${output}" PARENT_SCOPE)
endfunction()

set(short --synthetic --blocks 1 --epochs 1 --finetune-epochs 1 --batch 65 --device cpu --limit 390 --float64 --target 0.4)
run(${train_resnet} ${short} --out ${WORK_DIR}/one)
on_two_ranks("${short};--out;${WORK_DIR}/two" "${short};--out;${WORK_DIR}/two")
if(NOT codes STREQUAL "0;0")
  message(FATAL_ERROR "two ranks ended with ${codes}:\n${output}")
endif()
file(READ ${WORK_DIR}/one/plan.json plan_of_one)
file(READ ${WORK_DIR}/two/plan.json plan_of_two)
if(NOT plan_of_one STREQUAL plan_of_two)
  message(FATAL_ERROR "two ranks make another plan than one:\n${plan_of_one}\n${plan_of_two}")
endif()
foreach(ranks one two)
  file(READ ${WORK_DIR}/${ranks}/summary.json summary)
  string(JSON top1_${ranks} GET ${summary} top1_after)
  foreach(epoch 0 1)
    # The first nine digits as a whole number, which CMake can subtract.
    string(JSON loss GET ${summary} losses ${epoch})
    string(SUBSTRING "${loss}000000000" 0 10 loss)
    string(REPLACE "." "" loss_${ranks}_${epoch} "${loss}")
  endforeach()
endforeach()
math(EXPR before "${loss_one_0} - ${loss_two_0}")
math(EXPR after "${loss_one_1} - ${loss_two_1}")
if(NOT top1_one STREQUAL top1_two OR before LESS -1 OR before GREATER 1 OR after LESS -1 OR after GREATER 1)
  message(FATAL_ERROR "one rank: top-1 ${top1_one}, losses ${loss_one_0} ${loss_one_1}; "
                      "two ranks: ${top1_two}, ${loss_two_0} ${loss_two_1}")
endif()

# One that fails, here for wanting more than the plan of rank 0 gives, takes the other along.
on_two_ranks("${short};--out;${WORK_DIR}/two" "${short};--out;${WORK_DIR}/two;--target;0.95")
if(NOT codes STREQUAL "1;1" OR NOT output MATCHES "expected 95.0 %")
  message(FATAL_ERROR "a rank that fails, and the other, ended with ${codes}, expected 1;1:\n${output}")
endif()

file(READ ${WORK_DIR}/run/summary.json summary)
foreach(key top1_after macs_before macs_nominal macs_after)
  string(JSON ${key} GET ${summary} ${key})
endforeach()
# Ten classes: chance is 10 %.
if(NOT top1_after GREATER 80)
  message(FATAL_ERROR "top-1 after fine-tuning is ${top1_after} %, expected more than 80 %")
endif()
math(EXPR most_macs "${macs_before} * 51 / 100")
if(macs_after GREATER most_macs OR macs_after GREATER macs_nominal)
  message(FATAL_ERROR "MACs: ${macs_before} before, ${macs_nominal} nominal, ${macs_after} after; expected half of them or less")
endif()
